"""Time budgets: work that would not finish in time is skipped."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

ResultT = TypeVar("ResultT")


class OutOfTimeError(Exception):
    """A job was not started because it would not have finished in time."""


class TimeBudget:
    """A number of seconds, starting now.

    Parameters
    ----------
    seconds : float
        The budget.
    clock : callable
        Current time in seconds.
    """

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.seconds = seconds
        self.clock = clock
        self._start = clock()

    @property
    def spent(self) -> float:
        """Seconds since the start."""
        return self.clock() - self._start

    @property
    def left(self) -> float:
        """Seconds left."""
        return self.seconds - self.spent

    def part(self, share: float) -> TimeBudget:
        """Return a budget of a share of the time left, on the same clock."""
        return TimeBudget(share * self.left, self.clock)


class JobBudget:
    """Seconds for jobs of one kind, within a total budget.

    Parameters
    ----------
    seconds : float
        Budget of all jobs.
    expected : float
        Expected duration of the first job; later jobs are expected to take as long as the longest.
    total : TimeBudget
        The total budget.
    """

    def __init__(self, seconds: float, expected: float, total: TimeBudget) -> None:
        self._left = seconds
        self._expected = expected
        self._longest = 0.0
        self._total = total

    def run(self, job: Callable[[], ResultT]) -> ResultT:
        """Run a job.

        Raises
        ------
        OutOfTimeError
            If the expected duration exceeds the time left.
        """
        expected, left = self._longest or self._expected, min(self._left, self._total.left)
        if left < expected:
            raise OutOfTimeError(f"no time: {expected:.0f} s expected, {max(left, 0.0):.0f} s left")
        start = self._total.clock()
        try:
            return job()
        finally:
            seconds = self._total.clock() - start
            self._longest = max(self._longest, seconds)
            self._left -= seconds
