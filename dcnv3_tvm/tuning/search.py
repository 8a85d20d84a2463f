"""Which schedule to try next."""

from __future__ import annotations

import itertools
import json
import math
import random
from collections.abc import Iterator, Mapping
from typing import Final

from dcnv3_tvm.schedules.space import Decision

Decisions = Mapping[str, Decision]

_LISTED: Final = 4096
"""Schedules of a space that is listed as a whole; of a larger one random ones are drawn."""

_PARENTS: Final = 2
"""Best schedules whose neighbours are tried."""


def key_of(decisions: Decisions) -> str:
    """Return a text that is the same for the same decisions."""
    return json.dumps(dict(decisions), sort_keys=True)


class Search:
    """Search a space of decisions: the default first, then neighbours of the best, and chance.

    A neighbour differs in one decision. Half of the proposals are neighbours of the two best
    schedules known, half are drawn at random; none is proposed twice.

    Parameters
    ----------
    space : mapping of str to sequence of Decision
        What each decision may be, the default first.
    seed : int
        Of the random numbers.
    """

    def __init__(self, space: Mapping[str, tuple[Decision, ...]], seed: int = 0) -> None:
        self._space = space
        self._random = random.Random(seed)
        self._known: dict[str, float] = {}
        self._decisions: dict[str, dict[str, Decision]] = {}
        self._proposed: set[str] = set()

    def tell(self, decisions: Decisions, seconds: float | None) -> None:
        """Note how long a schedule takes; None if it does not work."""
        key = key_of(decisions)
        self._proposed.add(key)
        self._known[key] = math.inf if seconds is None else seconds
        self._decisions[key] = dict(decisions)

    @property
    def best(self) -> list[tuple[dict[str, Decision], float]]:
        """Schedules that work, and their times, the fastest first."""
        order = sorted(
            (key for key, time in self._known.items() if time < math.inf),
            key=self._known.__getitem__,
        )
        return [(self._decisions[key], self._known[key]) for key in order]

    def knows(self, decisions: Decisions) -> bool:
        """Whether a schedule was told of."""
        return key_of(decisions) in self._known

    def seconds(self, decisions: Decisions) -> float | None:
        """Return the time of a schedule; None if it is not known, or does not work."""
        time = self._known.get(key_of(decisions), math.inf)
        return time if time < math.inf else None

    def propose(self, count: int) -> list[dict[str, Decision]]:
        """Return up to `count` schedules to try; fewer only when hardly any are left."""
        chosen: list[dict[str, Decision]] = []

        def take(candidates: Iterator[dict[str, Decision]], most: int) -> None:
            for decisions in candidates:
                if len(chosen) >= most:
                    return
                key = key_of(decisions)
                if key not in self._proposed:
                    self._proposed.add(key)
                    chosen.append(decisions)

        take(iter([{name: values[0] for name, values in self._space.items()}]), count)
        take(self._neighbours(), max(len(chosen), (count + 1) // 2))
        take(self._drawn(), count)
        # Where chance finds nothing new, what is left is near what is known.
        take(self._neighbours(), count)
        return chosen

    def _neighbours(self) -> Iterator[dict[str, Decision]]:
        found = [
            {**best, name: value}
            for best, _ in self.best[:_PARENTS]
            for name, values in self._space.items()
            for value in values
            if value != best[name]
        ]
        self._random.shuffle(found)
        return iter(found)

    def _drawn(self) -> Iterator[dict[str, Decision]]:
        names = list(self._space)
        if math.prod(map(len, self._space.values())) <= _LISTED:
            everything = list(itertools.product(*self._space.values()))
            self._random.shuffle(everything)
            return (dict(zip(names, values, strict=True)) for values in everything)
        return (
            {name: self._random.choice(values) for name, values in self._space.items()}
            for _ in range(_LISTED)
        )
