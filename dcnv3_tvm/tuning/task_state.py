"""Measurements of a kernel in a tuning session."""

from __future__ import annotations

import dataclasses
from typing import Final

from dcnv3_tvm.schedules.records import Record
from dcnv3_tvm.tuning.search import Decisions, Search
from dcnv3_tvm.tuning.tasks import TuningTask

MAX_RATIO: Final = 0.97
"""A schedule replaces the default only if it takes less than this part of the default's time.

Smaller gains of a kernel measured alone may vanish in a model, where caches hold other data."""


@dataclasses.dataclass
class TaskState:
    """A tuning task and its trials.

    Parameters
    ----------
    task : TuningTask
        The kernel.
    """

    task: TuningTask
    search: Search = dataclasses.field(init=False)
    trials: int = dataclasses.field(default=0, init=False)
    failed: int = dataclasses.field(default=0, init=False)
    """Trials whose schedule failed."""
    curve: list[float] = dataclasses.field(default_factory=list, init=False)
    """Best time after each successful trial."""
    record: Record | None = dataclasses.field(default=None, init=False)
    """Selected schedule; its times, measured last, replace those of the trials."""

    def __post_init__(self) -> None:
        self.search = Search(self.task.space)

    @property
    def default_seconds(self) -> float | None:
        """Time of a call with the default schedule; None if it is unknown or failed."""
        if self.record is not None:
            return self.record.default_seconds
        return self.search.seconds(self.task.default)

    @property
    def best_seconds(self) -> float | None:
        """Time of a call with the schedule to choose; None before the first successful trial."""
        if self.record is not None:
            return self.record.seconds
        best, default = self.curve[-1] if self.curve else None, self.default_seconds
        if best is None or default is None:
            return best
        return best if best < MAX_RATIO * default else default

    @property
    def default_total(self) -> float:
        """Time of all calls with the default schedule; 0 if unknown."""
        return self.task.calls * (self.default_seconds or 0.0)

    @property
    def best_total(self) -> float:
        """Best time of all calls; 0 if unknown."""
        return self.task.calls * (self.best_seconds or 0.0)

    @property
    def speedup(self) -> float:
        """Default time divided by best time."""
        return (self.default_seconds or 1.0) / (self.best_seconds or 1.0)

    def has_tried(self, decisions: Decisions) -> bool:
        """Whether a schedule was tried."""
        return self.search.is_known(decisions)

    def priority(self, planned: int) -> float:
        """Return the priority of another trial: high for long total time and few trials.

        Parameters
        ----------
        planned : int
            Trials already planned for the next batch.

        Notes
        -----
        With the square, the trials of a kernel grow with the square root of its share of the time.
        """
        return self.best_total / (1 + self.trials + planned) ** 2

    def add_trial(self, decisions: Decisions, seconds: float | None) -> None:
        """Add a trial; `seconds` is None if the schedule failed."""
        self.search.tell(decisions, seconds)
        self.trials += 1
        if seconds is None:
            self.failed += 1
        else:
            self.curve.append(min(seconds, self.curve[-1] if self.curve else seconds))
