"""A benchmark that ends in time: what does not fit is left out, and said to be."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

ResultT = TypeVar("ResultT")


class NoTimeError(Exception):
    """A job was not begun, because it would not have ended in time."""


class Budget:
    """Seconds of the clock, from now on.

    Parameters
    ----------
    seconds : float
        How many.
    clock : callable
        Present time in seconds.
    """

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.seconds = seconds
        self._clock = clock
        self._start = clock()

    @property
    def spent(self) -> float:
        """Seconds since the beginning."""
        return self._clock() - self._start

    @property
    def left(self) -> float:
        """Seconds to the end."""
        return self.seconds - self.spent


class Allowance:
    """Seconds for jobs of one sort, within a budget.

    Parameters
    ----------
    seconds : float
        For all of them.
    expected : float
        What the first is taken to need; a later one as much as the longest before it.
    budget : Budget
        Which must hold, too.
    clock : callable
        Present time in seconds.
    """

    def __init__(
        self,
        seconds: float,
        expected: float,
        budget: Budget,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._left = seconds
        self._expected = expected
        self._longest = 0.0
        self._budget = budget
        self._clock = clock

    def do(self, job: Callable[[], ResultT]) -> ResultT:
        """Do a job.

        Raises
        ------
        NoTimeError
            If there is not the time for it.
        """
        expected, left = self._longest or self._expected, min(self._left, self._budget.left)
        if left < expected:
            raise NoTimeError(f"no time: {expected:.0f} s expected, {max(left, 0.0):.0f} s left")
        start = self._clock()
        try:
            return job()
        finally:
            seconds = self._clock() - start
            self._longest = max(self._longest, seconds)
            self._left -= seconds
