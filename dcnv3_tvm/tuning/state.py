"""What a session knows of a kernel."""

from __future__ import annotations

import dataclasses

from dcnv3_tvm.tuning.search import Decisions, Search
from dcnv3_tvm.tuning.tasks import Task


@dataclasses.dataclass
class TaskState:
    """A kernel, and its trials.

    Parameters
    ----------
    task : Task
        The kernel.
    """

    task: Task
    search: Search = dataclasses.field(init=False)
    trials: int = dataclasses.field(default=0, init=False)
    failed: int = dataclasses.field(default=0, init=False)
    """Trials of schedules that did not work."""
    curve: list[float] = dataclasses.field(default_factory=list, init=False)
    """Shortest time after each trial of one that did."""

    def __post_init__(self) -> None:
        self.search = Search(self.task.space)

    @property
    def default_seconds(self) -> float | None:
        """Time with the rule's own decisions; None if it is not known, or they do not work."""
        return self.search.seconds(self.task.default)

    @property
    def best_seconds(self) -> float | None:
        """Shortest time; None before one is known."""
        return self.curve[-1] if self.curve else None

    @property
    def default_total(self) -> float:
        """Time of all calls with the rule's own decisions; 0 if it is not known."""
        return self.task.calls * (self.default_seconds or 0.0)

    @property
    def best_total(self) -> float:
        """Shortest time of all calls; 0 before one is known."""
        return self.task.calls * (self.best_seconds or 0.0)

    @property
    def speedup(self) -> float:
        """How many times faster than by default the best schedule is."""
        return (self.default_seconds or 1.0) / (self.best_seconds or 1.0)

    def tried(self, decisions: Decisions) -> bool:
        """Whether a schedule was tried."""
        return self.search.knows(decisions)

    def urgency(self, planned: int) -> float:
        """Say how much a trial may gain: the more, the more time goes by, the less was tried.

        The square makes the trials of a kernel grow with the root of its share of the time.
        """
        return self.best_total / (1 + self.trials + planned) ** 2

    def note(self, decisions: Decisions, seconds: float | None) -> None:
        """Take a trial in."""
        self.search.tell(decisions, seconds)
        self.trials += 1
        if seconds is None:
            self.failed += 1
        else:
            self.curve.append(min(seconds, self.best_seconds or seconds))
