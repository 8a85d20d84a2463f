"""What a schedule rule decides, by name: a tuner tries other decisions than the rule's own."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TypeVar

from dcnv3_tvm.errors import CompileError

Choice = int | str
"""The value of a decision."""

ChoiceT = TypeVar("ChoiceT", int, str)


class ChoiceError(CompileError):
    """A decision given to a rule is none that it can take for the kernel."""


@dataclasses.dataclass
class Choices:
    """Answers to the questions of a rule, and what it asked.

    A rule asks for every decision by `pick`, which gives back its default unless another value was
    given. The names, and what each may be, depend on the kernel and the target alone, never on
    other decisions: so they span the space in which a tuner searches.

    Parameters
    ----------
    given : mapping of str to Choice
        Decisions to take instead of the rule's own, by name.
    """

    given: Mapping[str, Choice] = dataclasses.field(default_factory=dict)
    space: dict[str, tuple[Choice, ...]] = dataclasses.field(default_factory=dict, init=False)
    """What each decision may be: the rule's default first."""

    def pick(self, name: str, candidates: Sequence[ChoiceT], default: ChoiceT) -> ChoiceT:
        """Decide.

        Parameters
        ----------
        name : str
            Of the decision, unique in a rule.
        candidates : sequence of Choice
            What it may be; `default` need not be among them.
        default : Choice
            What the rule would do.

        Raises
        ------
        ChoiceError
            If another value was given.
        """
        others: tuple[Choice, ...] = tuple(
            value for value in dict.fromkeys(candidates) if value != default
        )
        self.space[name] = (default, *others)
        value = self.given.get(name, default)
        if value not in self.space[name]:
            raise ChoiceError(
                f"the schedule cannot have this {name}",
                got=value,
                allowed=", ".join(map(str, self.space[name])),
            )
        return value  # type: ignore[return-value]  # it is one of `space[name]`

    def check_all_asked(self) -> None:
        """Refuse decisions that the rule did not ask for.

        Raises
        ------
        ChoiceError
            If there are any.
        """
        unknown = sorted(self.given.keys() - self.space.keys())
        if unknown:
            raise ChoiceError(
                "the schedule makes no such decision",
                got=", ".join(unknown),
                allowed=", ".join(self.space) or "none",
            )
