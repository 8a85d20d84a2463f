"""Search strategy: choose the next candidate schedules of a kernel."""

from __future__ import annotations

import itertools
import json
import math
import random
from collections.abc import Iterator, Mapping
from typing import Final

from dcnv3_tvm.schedules.space import Decision

Decisions = Mapping[str, Decision]

_ENUMERATED: Final = 4096
"""Largest space that is enumerated; larger ones are sampled."""

_PARENTS: Final = 2
"""Number of best schedules whose neighbours are proposed."""


def decisions_key(decisions: Decisions) -> str:
    """Return a string that is equal for equal decisions, whatever their order."""
    return json.dumps(dict(decisions), sort_keys=True)


class Search:
    """Propose the default first, then a mix of neighbours of the best and random schedules.

    A neighbour differs in one decision. Half of the proposals are neighbours of the two best
    schedules known, half are random; none is proposed twice.

    Parameters
    ----------
    space : mapping of str to tuple of Decision
        Candidates of each decision, the default first.
    """

    def __init__(self, space: Mapping[str, tuple[Decision, ...]]) -> None:
        self._space = space
        self._random = random.Random(0)
        self._times: dict[str, float] = {}
        self._decisions: dict[str, dict[str, Decision]] = {}
        self._proposed: set[str] = set()

    def tell(self, decisions: Decisions, seconds: float | None) -> None:
        """Report the time of a schedule; None if it failed."""
        key = decisions_key(decisions)
        self._proposed.add(key)
        self._times[key] = math.inf if seconds is None else seconds
        self._decisions[key] = dict(decisions)

    @property
    def best(self) -> list[tuple[dict[str, Decision], float]]:
        """Schedules that work and their times, fastest first."""
        order = sorted(
            (key for key, time in self._times.items() if time < math.inf),
            key=self._times.__getitem__,
        )
        return [(self._decisions[key], self._times[key]) for key in order]

    def is_known(self, decisions: Decisions) -> bool:
        """Whether a result of these decisions was reported."""
        return decisions_key(decisions) in self._times

    def seconds(self, decisions: Decisions) -> float | None:
        """Return the time of a schedule; None if it is unknown or failed."""
        time = self._times.get(decisions_key(decisions), math.inf)
        return time if time < math.inf else None

    def propose(self, count: int) -> list[dict[str, Decision]]:
        """Return up to `count` new schedules; fewer only if the space is nearly exhausted."""
        chosen: list[dict[str, Decision]] = []

        def take(candidates: Iterator[dict[str, Decision]], limit: int) -> None:
            for decisions in candidates:
                if len(chosen) >= limit:
                    return
                key = decisions_key(decisions)
                if key not in self._proposed:
                    self._proposed.add(key)
                    chosen.append(decisions)

        take(iter([{name: values[0] for name, values in self._space.items()}]), count)
        take(self._neighbours(), max(len(chosen), (count + 1) // 2))
        take(self._samples(), count)
        # Random samples of a large space may all be known already.
        take(self._neighbours(), count)
        return chosen

    def _neighbours(self) -> Iterator[dict[str, Decision]]:
        neighbours = [
            {**best, name: value}
            for best, _ in self.best[:_PARENTS]
            for name, values in self._space.items()
            for value in values
            if value != best[name]
        ]
        self._random.shuffle(neighbours)
        return iter(neighbours)

    def _samples(self) -> Iterator[dict[str, Decision]]:
        names = list(self._space)
        if math.prod(map(len, self._space.values())) <= _ENUMERATED:
            everything = list(itertools.product(*self._space.values()))
            self._random.shuffle(everything)
            return (dict(zip(names, values, strict=True)) for values in everything)
        return (
            {name: self._random.choice(values) for name, values in self._space.items()}
            for _ in range(_ENUMERATED)
        )
