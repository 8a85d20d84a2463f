"""Search space of a kernel: the decisions of its schedule rule, and the candidates of each."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TypeVar

from dcnv3_tvm.errors import CompileError

Decision = int | str
"""Value of a decision, such as a tile size or the name of a loop order."""

DecisionT = TypeVar("DecisionT", int, str)


class DecisionError(CompileError):
    """A schedule rule does not support a decision given to it."""


@dataclasses.dataclass
class SearchSpace:
    """Collects the decisions of a rule and replaces their defaults.

    A rule makes every decision by `pick`. The names and candidates depend on the kernel and the
    target only, not on other decisions, so that a tuner can search their Cartesian product.

    Parameters
    ----------
    given : mapping of str to Decision
        Decisions to take instead of the rule's defaults, by name.
    """

    given: Mapping[str, Decision] = dataclasses.field(default_factory=dict)
    candidates: dict[str, tuple[Decision, ...]] = dataclasses.field(
        default_factory=dict, init=False
    )
    """Candidates of each decision made so far, the default first."""

    def pick(self, name: str, candidates: Sequence[DecisionT], default: DecisionT) -> DecisionT:
        """Return the given value of a decision, or its default.

        Parameters
        ----------
        name : str
            Name of the decision, unique within a rule.
        candidates : sequence of Decision
            Possible values; `default` need not be among them.
        default : Decision
            Value to take if none is given.

        Raises
        ------
        DecisionError
            If the given value is not a candidate.
        """
        others: tuple[Decision, ...] = tuple(
            value for value in dict.fromkeys(candidates) if value != default
        )
        self.candidates[name] = (default, *others)
        value = self.given.get(name, default)
        if value not in self.candidates[name]:
            raise DecisionError(
                f"the schedule does not support this value of {name}",
                got=value,
                allowed=", ".join(map(str, self.candidates[name])),
            )
        return value  # type: ignore[return-value]  # it is one of `candidates[name]`

    def check_all_used(self) -> None:
        """Check that the rule made every decision that was given.

        Raises
        ------
        DecisionError
            If it did not.
        """
        unknown = sorted(self.given.keys() - self.candidates.keys())
        if unknown:
            raise DecisionError(
                "the schedule has no such decision",
                got=", ".join(unknown),
                allowed=", ".join(self.candidates) or "none",
            )
