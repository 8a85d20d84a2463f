"""Time contestants in bursts, in turn, and say how far the times scatter.

Every runtime keeps a thread pool that goes on spinning for a while after a call, and so slows down
whoever computes next. Hence bursts of one contestant at a time with a pause before each, of which
the first calls do not count; and a comparison is a ratio of bursts of the same round.
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
    """How often what is called.

    Parameters
    ----------
    rounds : int
        Bursts of each contestant.
    calls : int
        Calls in a burst.
    dropped : int
        Calls at the beginning of a burst that do not count.
    pause : float
        Seconds between bursts.
    burst_seconds : float
        A burst ends early when it has taken so long, but not before its second call.
    outlier : float
        A burst whose median is so many times its contestant's is done once more.
    """

    rounds: int = 5
    calls: int = 12
    dropped: int = 3
    pause: float = 0.3
    burst_seconds: float = 4.0
    outlier: float = 1.3


@dataclasses.dataclass(frozen=True)
class Quartiles:
    """Median and quartiles of a sample, and its least value."""

    best: float
    lower: float
    median: float
    upper: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Quartiles:
        """Summarise one value or more."""
        if len(values) == 1:
            return cls(*[values[0]] * 4)
        lower, median, upper = statistics.quantiles(values, n=4, method="inclusive")
        return cls(min(values), lower, median, upper)

    def scaled(self, factor: float) -> Quartiles:
        """Multiply every value."""
        return Quartiles(*(factor * value for value in dataclasses.astuple(self)))


@dataclasses.dataclass(frozen=True)
class Timing:
    """The counted calls of one contestant.

    Parameters
    ----------
    bursts : tuple of tuple of float
        Seconds of each call, by round.
    redone : int
        Bursts that were taken in place of outliers.
    """

    bursts: tuple[tuple[float, ...], ...]
    redone: int = 0

    @property
    def seconds(self) -> Quartiles:
        """Of all counted calls."""
        return Quartiles.of([call for burst in self.bursts for call in burst])

    def ratio_to(self, other: Timing) -> Quartiles:
        """Divide the bursts' medians by those of another contestant, round by round."""
        pairs = zip(self.bursts, other.bursts, strict=True)
        return Quartiles.of(
            [statistics.median(mine) / statistics.median(theirs) for mine, theirs in pairs]
        )


def measure(
    contestants: Mapping[str, Callable[[], Any]],
    plan: Plan,
    *,
    clock: Callable[[], float] = time.perf_counter,
    sleep: Callable[[float], None] = time.sleep,
    on_round: Callable[[int], None] | None = None,
    before: Mapping[str, Callable[[], Any]] | None = None,
    seconds_of: Callable[[Callable[[], Any]], float] | None = None,
) -> dict[str, Timing]:
    """Time contestants that are warm already.

    Parameters
    ----------
    contestants : mapping of str to callable
        What is timed, in the order of the turns.
    plan : Plan
        How often.
    clock, sleep : callable
        Present time in seconds, and waiting.
    on_round : callable, optional
        Called with the number of each round as it begins.
    before : mapping of str to callable, optional
        What is called before each call of a contestant, and not timed.
    seconds_of : callable, optional
        Makes a call and returns how long it took, in place of looks at `clock`.

    Returns
    -------
    dict of str to Timing
    """
    timed = seconds_of or functools.partial(_timed, clock)
    take = {
        name: functools.partial(_burst, call, (before or {}).get(name), plan, timed, sleep)
        for name, call in contestants.items()
    }
    bursts: dict[str, list[tuple[float, ...]]] = {name: [] for name in contestants}
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
    """Return the time of a call that may be far shorter than a look at the clock.

    Parameters
    ----------
    call : callable
        What is timed.
    seconds : float
        Least time of a burst; how many calls that takes is found out, which warms up.
    bursts : int
        How many are taken. Nobody else computes between them, so there is no pause.
    clock : callable
        Present time in seconds.
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
    # The new burst counts whatever it shows: choosing the faster one would flatter.
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
