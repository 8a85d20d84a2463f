"""Time backends alternately, in bursts of calls.

Every runtime keeps a thread pool that spins for some time after a call and slows down whatever runs
next. Backends therefore run in bursts with a pause before each burst and discarded first calls, and
are compared by ratios of bursts of the same round.
"""

from __future__ import annotations

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any


@dataclasses.dataclass(frozen=True)
class Plan:
    """Number of calls to time.

    Parameters
    ----------
    rounds : int
        Bursts per backend.
    calls : int
        Calls per burst.
    dropped : int
        Discarded calls at the start of each burst.
    pause : float
        Seconds before each burst.
    burst_seconds : float
        A burst ends when it has taken this long, but not before its second call.
    outlier : float
        A burst is repeated if its median exceeds the backend's by this factor.
    """

    rounds: int = 5
    calls: int = 12
    dropped: int = 3
    pause: float = 0.3
    burst_seconds: float = 4.0
    outlier: float = 1.3


@dataclasses.dataclass(frozen=True)
class Quartiles:
    """Minimum, quartiles and median of a sample."""

    best: float
    lower: float
    median: float
    upper: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Quartiles:
        """Summarise at least one value."""
        if len(values) == 1:
            return cls(*[values[0]] * 4)
        lower, median, upper = statistics.quantiles(values, n=4, method="inclusive")
        return cls(min(values), lower, median, upper)

    def scaled(self, factor: float) -> Quartiles:
        """Multiply every value."""
        return Quartiles(*(factor * value for value in dataclasses.astuple(self)))


@dataclasses.dataclass(frozen=True)
class Timing:
    """Timed calls of one backend.

    Parameters
    ----------
    bursts : tuple of tuple of float
        Seconds of each call, by round.
    redone : int
        Number of repeated bursts.
    """

    bursts: tuple[tuple[float, ...], ...]
    redone: int = 0

    @property
    def seconds(self) -> Quartiles:
        """Statistics of all timed calls."""
        return Quartiles.of([call for burst in self.bursts for call in burst])

    def ratio_to(self, other: Timing) -> Quartiles:
        """Return the ratio of burst medians to those of another backend, round by round."""
        pairs = zip(self.bursts, other.bursts, strict=True)
        return Quartiles.of(
            [statistics.median(mine) / statistics.median(theirs) for mine, theirs in pairs]
        )


def measure(
    calls: Mapping[str, Callable[[], Any]],
    plan: Plan,
    *,
    clock: Callable[[], float] = time.perf_counter,
    sleep: Callable[[float], None] = time.sleep,
    on_round: Callable[[int], None] | None = None,
    before: Mapping[str, Callable[[], Any]] | None = None,
    seconds_of: Callable[[Callable[[], Any]], float] | None = None,
) -> dict[str, Timing]:
    """Time backends that are already warmed up.

    Parameters
    ----------
    calls : mapping of str to callable
        Calls to time, in the order in which they are run.
    plan : Plan
        Number of calls.
    clock, sleep : callable
        Current time in seconds, and sleeping.
    on_round : callable, optional
        Called with the number of each round before it starts.
    before : mapping of str to callable, optional
        Untimed calls before each call of a backend.
    seconds_of : callable, optional
        Makes a call and returns its duration; measured with `clock` by default.
    """
    timed = seconds_of or functools.partial(_timed, clock)
    take = {
        name: functools.partial(_burst, call, (before or {}).get(name), plan, timed, sleep)
        for name, call in calls.items()
    }
    bursts: dict[str, list[tuple[float, ...]]] = {name: [] for name in calls}
    for number in range(plan.rounds):
        if on_round is not None:
            on_round(number)
        for name, burst in take.items():
            bursts[name].append(burst())
    return {
        name: _without_outliers(bursts[name], burst, plan.outlier) for name, burst in take.items()
    }


def median_of_bursts(
    call: Callable[[], Any],
    *,
    seconds: float,
    bursts: int = 7,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """Time a call that may be shorter than the resolution of the clock.

    Parameters
    ----------
    call : callable
        Call to time.
    seconds : float
        Minimum duration of a burst. The number of calls is doubled until a burst takes this long,
        which also warms up.
    bursts : int
        Number of bursts. Nothing else computes between them, so there is no pause.
    clock : callable
        Current time in seconds.
    """

    def burst(calls: int) -> float:
        start = clock()
        for _ in range(calls):
            call()
        return clock() - start

    calls = 1
    while burst(calls) < seconds:
        calls *= 2
    return statistics.median(burst(calls) for _ in range(bursts)) / calls


def _without_outliers(
    bursts: list[tuple[float, ...]], take: Callable[[], tuple[float, ...]], outlier: float
) -> Timing:
    medians = [statistics.median(burst) for burst in bursts]
    limit = outlier * statistics.median(medians)
    late = [number for number, median in enumerate(medians) if median > limit]
    # The new burst replaces the old one even if it is slower: taking the faster would be biased.
    for number in late:
        bursts[number] = take()
    return Timing(tuple(bursts), len(late))


def _timed(clock: Callable[[], float], call: Callable[[], Any]) -> float:
    start = clock()
    call()
    return clock() - start


def _burst(
    call: Callable[[], Any],
    before: Callable[[], Any] | None,
    plan: Plan,
    seconds_of: Callable[[Callable[[], Any]], float],
    sleep: Callable[[float], None],
) -> tuple[float, ...]:
    sleep(plan.pause)
    times: list[float] = []
    while len(times) < plan.calls and (len(times) < 2 or sum(times) < plan.burst_seconds):
        if before is not None:
            before()
        times.append(seconds_of(call))
    return tuple(times[min(plan.dropped, len(times) - 1) :])
