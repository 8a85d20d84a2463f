"""What a schedule rule decides, by name: a tuner tries other decisions than the rule's own."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TypeVar

from dcnv3_tvm.errors import CompileError

Decision = int | str
"""The value of a decision."""

DecisionT = TypeVar("DecisionT", int, str)


class DecisionError(CompileError):
    """A decision given to a rule is none that it can take for the kernel."""


@dataclasses.dataclass
class SearchSpace:
    """Answers to the questions of a rule, and what it asked.

    A rule asks for every decision by `pick`, which gives back its default unless another value was
    given. The names, and what each may be, depend on the kernel and the target alone, never on
    other decisions: so they span the space in which a tuner searches.

    Parameters
    ----------
    given : mapping of str to Decision
        Decisions to take instead of the rule's own, by name.
    """

    given: Mapping[str, Decision] = dataclasses.field(default_factory=dict)
    candidates: dict[str, tuple[Decision, ...]] = dataclasses.field(
        default_factory=dict, init=False
    )
    """What each decision may be: the rule's default first."""

    def pick(self, name: str, candidates: Sequence[DecisionT], default: DecisionT) -> DecisionT:
        """Decide.

        Parameters
        ----------
        name : str
            Of the decision, unique in a rule.
        candidates : sequence of Decision
            What it may be; `default` need not be among them.
        default : Decision
            What the rule would do.

        Raises
        ------
        DecisionError
            If another value was given.
        """
        others: tuple[Decision, ...] = tuple(
            value for value in dict.fromkeys(candidates) if value != default
        )
        self.candidates[name] = (default, *others)
        value = self.given.get(name, default)
        if value not in self.candidates[name]:
            raise DecisionError(
                f"the schedule cannot have this {name}",
                got=value,
                allowed=", ".join(map(str, self.candidates[name])),
            )
        return value  # type: ignore[return-value]  # it is one of `candidates[name]`

    def check_all_asked(self) -> None:
        """Refuse decisions that the rule did not ask for.

        Raises
        ------
        DecisionError
            If there are any.
        """
        unknown = sorted(self.given.keys() - self.candidates.keys())
        if unknown:
            raise DecisionError(
                "the schedule makes no such decision",
                got=", ".join(unknown),
                allowed=", ".join(self.candidates) or "none",
            )
