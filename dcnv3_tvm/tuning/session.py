"""Tuning session: measure candidates until the budget is spent, then select schedules."""

from __future__ import annotations

import dataclasses
import errno
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from dcnv3_tvm.errors import TuningError
from dcnv3_tvm.schedules.records import SESSION_SUBFOLDER, About, Records
from dcnv3_tvm.tuning.context import MeasurementContext
from dcnv3_tvm.tuning.measurer import Measurer
from dcnv3_tvm.tuning.selection import expected_measurements, select_schedule
from dcnv3_tvm.tuning.task_state import TaskState
from dcnv3_tvm.tuning.tasks import Candidate, TuningTask
from dcnv3_tvm.tuning.trial_log import TrialLog

TRIALS: Final = "trials.jsonl"
"""Name of the trial log in a work directory."""

_TASK_BATCH: Final = 8
"""Candidates of one kernel that are planned before priorities are compared again."""

_MIN_BATCH: Final = 16
"""Candidates built and measured together; more if there are many devices."""

_DISK_FULL: Final = os.strerror(errno.ENOSPC)


@dataclasses.dataclass(frozen=True)
class TuningBudget:
    """Limits of a session.

    Parameters
    ----------
    trials : int
        Total number of trials, those of earlier sessions in the work directory included.
    minutes : float, optional
        Duration of this session, the final measurements included.
    """

    trials: int
    minutes: float | None = None


class TuningSession:
    """A tuning session in a work directory, which may hold trials of earlier sessions.

    Parameters
    ----------
    directory : Path
        The work directory; it is created if missing.
    tasks : sequence of TuningTask
        Kernels to tune.
    context : MeasurementContext
        Target, hardware and TVM version.
    budget : TuningBudget
        Limits.
    commit : str, optional
        Git commit of this library, stored in the records.
    on_update : callable, optional
        Called with the session after every change.
    clock : callable, optional
        Returns the time in seconds.
    """

    def __init__(
        self,
        directory: Path,
        tasks: Sequence[TuningTask],
        context: MeasurementContext,
        budget: TuningBudget,
        *,
        commit: str | None = None,
        on_update: Callable[[TuningSession], None] = lambda _: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.directory, self.context, self.budget = directory, context, budget
        self.states = [TaskState(task) for task in tasks]
        self._by_workload = {state.task.workload: state for state in self.states}
        self.stage = "search"
        self.interrupted = False
        self.ignored = 0
        """Trials of earlier sessions whose kernel or decisions are not part of this session."""
        self._commit = commit
        self._on_update = on_update
        self._clock = clock
        self._resumed = 0
        self._started = clock()
        self._ended: float | None = None

    @property
    def trials(self) -> int:
        """Number of trials, those of earlier sessions included."""
        return sum(state.trials for state in self.states)

    @property
    def seconds(self) -> float:
        """Duration of the session."""
        return (self._clock() if self._ended is None else self._ended) - self._started

    @property
    def trials_per_minute(self) -> float:
        """Rate of this session's own trials."""
        return 60 * (self.trials - self._resumed) / max(self.seconds, 1e-9)

    @property
    def seconds_left(self) -> float:
        """Estimated remaining time of the search."""
        rate = self.trials_per_minute / 60
        left = (self.budget.trials - self.trials) / rate if rate else 0.0
        if self.budget.minutes is not None:
            left = min(left, 60 * self.budget.minutes - self.seconds)
        return max(0.0, left)

    def run(self, measurer: Measurer) -> Records:
        """Tune, and write the records to the folder ``records`` of the work directory.

        Ctrl-C ends the search only: the best schedules so far are still remeasured and recorded.

        Parameters
        ----------
        measurer : Measurer
            Builds and measures candidates.

        Raises
        ------
        TuningError
            If another session is using the directory, every default schedule fails, or a file
            cannot be written.
        InvalidArgumentError
            If the directory belongs to another context, or holds something else.
        """
        self._started = self._clock()
        self.context.bind(self.directory)
        with TrialLog(self.directory / TRIALS) as log:
            self._resume(log)
            try:
                self._measure_defaults(measurer, log)
                self._search(measurer, log)
            except KeyboardInterrupt:
                self.interrupted = True
            self._enter("final measurement")
            self._select(measurer, log)
            records = Records.of(
                self._about(), (state.record for state in self.states if state.record is not None)
            )
            self._write(records)
        self._ended = self._clock()
        self._enter("interrupted" if self.interrupted else "done")
        return records

    def _enter(self, stage: str) -> None:
        self.stage = stage
        self._on_update(self)

    def _resume(self, log: TrialLog) -> None:
        """Load the trials of earlier sessions."""
        for entry in log.entries:
            state = self._by_workload.get(entry["workload"])
            decisions = entry["decisions"]
            if state is None or not state.task.allows(decisions):
                self.ignored += 1
            else:
                state.add_trial(decisions, entry["seconds"])
        self._resumed = self.trials

    def _measure_defaults(self, measurer: Measurer, log: TrialLog) -> None:
        """Measure the default schedule of every kernel, whatever the budget."""
        defaults = [
            Candidate(state.task, state.task.default)
            for state in self.states
            if not state.has_tried(state.task.default)
        ]
        for start in range(0, len(defaults), _MIN_BATCH):
            self._measure(measurer, log, defaults[start : start + _MIN_BATCH])
        if all(state.default_seconds is None for state in self.states):
            raise TuningError(
                "the default schedules of all kernels fail on this device",
                got=log.entries[-1]["error"] if log.entries else "no kernel to tune",
            )

    def _search(self, measurer: Measurer, log: TrialLog) -> None:
        """Spend the budget on the kernels with the highest priority."""
        size = max(_MIN_BATCH, 4 * measurer.devices.size)
        while self.trials < self.budget.trials and not self._is_time_up():
            batch = self._next_batch(size)
            if not batch:
                return
            self._measure(measurer, log, batch)

    def _is_time_up(self) -> bool:
        if self.budget.minutes is None:
            return False
        reserve = 60 * expected_measurements(self.states) / max(self.trials_per_minute, 1.0)
        return self.seconds + reserve > 60 * self.budget.minutes

    def _next_batch(self, size: int) -> list[Candidate]:
        """Propose candidates of the kernels with the highest priority."""
        size = min(size, self.budget.trials - self.trials)
        batch: list[Candidate] = []
        states = [state for state in self.states if state.default_seconds is not None]
        planned = dict.fromkeys(map(id, states), 0)
        while len(batch) < size and states:
            state = max(states, key=lambda state: state.priority(planned[id(state)]))
            proposals = state.search.propose(min(_TASK_BATCH, size - len(batch)))
            planned[id(state)] += len(proposals)
            batch += [Candidate(state.task, decisions) for decisions in proposals]
            if not proposals:
                states.remove(state)
        return batch

    def _measure(self, measurer: Measurer, log: TrialLog, batch: Sequence[Candidate]) -> None:
        """Measure candidates, and log each as soon as its result is known."""
        for number, result in measurer.measure(batch):
            candidate = batch[number]
            if _DISK_FULL in result.error:
                raise TuningError(
                    "there is no disk space for compiled candidates",
                    got=result.error,
                    hint=f"All trials are saved: free some space in {tempfile.gettempdir()}, or "
                    "set TMPDIR to another folder, and rerun the same command.",
                )
            seconds = None if result.error else result.value
            log.add_trial(candidate, seconds, result.error)
            self._by_workload[candidate.task.workload].add_trial(candidate.decisions, seconds)
            self._on_update(self)

    def _select(self, measurer: Measurer, log: TrialLog) -> None:
        """Select a schedule of each kernel whose default works."""
        for state in self.states:
            if state.default_seconds is not None:
                state.record = select_schedule(state, measurer, log)
                self._on_update(self)

    def _write(self, records: Records) -> None:
        folder = self.directory / SESSION_SUBFOLDER
        try:
            records.write(folder)
        except OSError as error:
            raise TuningError(
                "the records cannot be written",
                got=f"{error.strerror} ({folder})",
                hint="All trials are saved: free some space and rerun the same command.",
            ) from error

    def _about(self) -> About:
        return About(
            **dataclasses.asdict(self.context),
            commit=self._commit,
            trials=self.trials,
            date=time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime()),
        )
