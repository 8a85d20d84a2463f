"""A tuning session: measure schedules of some kernels until the budget is spent, keep the best."""

from __future__ import annotations

import dataclasses
import errno
import json
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Final

from tvm.target import Target

from dcnv3_tvm import files
from dcnv3_tvm.schedules.records import SESSION_SUBFOLDER, About, Record, Records, tvm_version
from dcnv3_tvm.targets import target_slug
from dcnv3_tvm.tuning.journal import Journal, SessionError
from dcnv3_tvm.tuning.laboratory import Candidate, Laboratory
from dcnv3_tvm.tuning.state import TaskState
from dcnv3_tvm.tuning.tasks import Task

TRIALS: Final = "trials.jsonl"
"""File of a work directory with every trial."""

_SETTING: Final = "session.json"

_PORTION: Final = 8
"""Candidates of one kernel that are tried before it is asked again which kernel is most urgent."""

_BATCH: Final = 16
"""Candidates compiled and measured together; more where there are many devices."""

_FULL: Final = os.strerror(errno.ENOSPC)

_CONTENDERS: Final = 3
"""Best schedules of a kernel that are measured again, against the default, before one is kept."""

_ROUNDS: Final = 3
_WORTH: Final = 0.97
"""Part of the default's time that a schedule must stay below, to be kept instead.

What is faster alone by less need not be so in a model, where other data are in the caches."""


@dataclasses.dataclass(frozen=True)
class Setting:
    """What times depend on: trials of different settings do not go together.

    Parameters
    ----------
    target : str
        Slug of the target.
    hardware : str
        What is measured on.
    cores : int
        Of it, that compute.
    tvm : str
        Version of apache-tvm.
    """

    target: str
    hardware: str
    cores: int
    tvm: str

    @classmethod
    def of(cls, target: Target, *, hardware: str, cores: int) -> Setting:
        """Describe a session with the installed TVM."""
        return cls(target_slug(target), hardware, cores, tvm_version())


@dataclasses.dataclass(frozen=True)
class Budget:
    """When a session ends.

    Parameters
    ----------
    trials : int
        Schedules tried, those of earlier sessions in the directory included.
    minutes : float, optional
        Of this session, the last measurements included.
    """

    trials: int
    minutes: float | None = None


class Session:
    """A session in a work directory, in which an earlier one may have left its trials.

    Parameters
    ----------
    directory : Path
        The work directory; it is made if it is not there.
    tasks : sequence of Task
        What to tune.
    setting : Setting
        On what.
    budget : Budget
        When to end.
    commit : str, optional
        Of this library, for the records.
    on_news : callable, optional
        Called with the session whenever something has changed.
    """

    def __init__(
        self,
        directory: Path,
        tasks: Sequence[Task],
        setting: Setting,
        budget: Budget,
        *,
        commit: str | None = None,
        on_news: Callable[[Session], None] = lambda _: None,
    ) -> None:
        self.directory, self.setting, self.budget = directory, setting, budget
        self.states = [TaskState(task) for task in tasks]
        self._by_workload = {state.task.workload: state for state in self.states}
        self.stage = "search"
        self.interrupted = False
        self.ignored = 0
        """Trials of earlier sessions for kernels or decisions that are none of this one's."""
        self._commit = commit
        self._on_news = on_news
        self._resumed = 0
        self._started = time.monotonic()

    @property
    def trials(self) -> int:
        """Trials in all."""
        return sum(state.trials for state in self.states)

    @property
    def seconds(self) -> float:
        """Since the session began."""
        return time.monotonic() - self._started

    @property
    def trials_per_minute(self) -> float:
        """Of this session."""
        return 60 * (self.trials - self._resumed) / max(self.seconds, 1e-9)

    @property
    def seconds_left(self) -> float:
        """An estimate of what the search will still take."""
        rate = self.trials_per_minute / 60
        left = (self.budget.trials - self.trials) / rate if rate else 0.0
        if self.budget.minutes is not None:
            left = min(left, 60 * self.budget.minutes - self.seconds)
        return max(0.0, left)

    def run(self, laboratory: Laboratory) -> Records:
        """Tune, and write the records to the folder ``records`` of the work directory.

        Ctrl-C ends the search; the best found until then are measured again and kept, as always.

        Parameters
        ----------
        laboratory : Laboratory
            Where candidates are compiled and measured.

        Raises
        ------
        SessionError
            If another session is at work in the directory, if the directory is one of another
            setting, if no kernel works, or if something cannot be written.
        """
        self._started = time.monotonic()
        self._prepare()
        with Journal(self.directory / TRIALS) as journal:
            self._resume(journal)
            try:
                self._search(laboratory, journal)
            except KeyboardInterrupt:
                self.interrupted = True
            self.stage = "the best again"
            self._on_news(self)
            records = Records.of(self._about(), self._chosen(laboratory, journal))
            try:
                records.write(self.directory / SESSION_SUBFOLDER)
            except OSError as error:
                raise SessionError(
                    "the records cannot be written",
                    got=f"{error.strerror} ({self.directory / SESSION_SUBFOLDER})",
                    hint="All trials are kept: make room, and start the same command again.",
                ) from error
        self.stage = "done"
        self._on_news(self)
        return records

    def _prepare(self) -> None:
        """Make the directory, or check that it is one of this setting."""
        path = self.directory / _SETTING
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            if not path.exists():
                with files.atomic_file(path) as temporary:
                    temporary.write_text(json.dumps(dataclasses.asdict(self.setting), indent=2))
            there = Setting(**json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise SessionError("the work directory cannot be used", got=error) from error
        if there != self.setting:
            raise SessionError(
                "the work directory is one of a session whose times do not compare with these",
                got=there,
                allowed=self.setting,
                hint="Choose another --work-dir.",
            )

    def _resume(self, journal: Journal) -> None:
        """Take in the trials of earlier sessions."""
        for entry in journal.entries:
            state = self._by_workload.get(entry.get("workload", ""))
            decisions = entry.get("decisions", {})
            if state is None or not state.task.allows(decisions):
                self.ignored += 1
            else:
                state.note(decisions, entry.get("seconds"))
        self._resumed = self.trials

    def _search(self, laboratory: Laboratory, journal: Journal) -> None:
        """Try the default of every kernel, then spend the budget where the time is."""
        missing = [state for state in self.states if not state.tried(state.task.default)]
        for start in range(0, len(missing), _BATCH):
            batch = [
                Candidate(state.task, state.task.default)
                for state in missing[start : start + _BATCH]
            ]
            self._try(laboratory, journal, batch)
        if all(state.default_seconds is None for state in self.states):
            raise SessionError(
                "no kernel works on this device with its default schedule",
                got=journal.entries[-1]["error"] if journal.entries else "no kernel to tune",
            )
        while self.trials < self.budget.trials and not self._time_is_up():
            batch = self._batch(max(_BATCH, 4 * laboratory.devices.count))
            if not batch:
                return
            self._try(laboratory, journal, batch)

    def _time_is_up(self) -> bool:
        if self.budget.minutes is None:
            return False
        improved = sum(state.speedup > 1 / _WORTH for state in self.states)
        reserve = improved * (_CONTENDERS + 1) * _ROUNDS * 60 / max(self.trials_per_minute, 1.0)
        return self.seconds + reserve > 60 * self.budget.minutes

    def _batch(self, size: int) -> list[Candidate]:
        """Choose what to try next: of the kernels on which a trial may gain most."""
        size = min(size, self.budget.trials - self.trials)
        batch: list[Candidate] = []
        open_states = [state for state in self.states if state.default_seconds is not None]
        planned = dict.fromkeys(map(id, open_states), 0)
        while len(batch) < size and open_states:
            state = max(open_states, key=lambda state: state.urgency(planned[id(state)]))
            proposals = state.search.propose(min(_PORTION, size - len(batch)))
            planned[id(state)] += len(proposals)
            batch += [Candidate(state.task, decisions) for decisions in proposals]
            if not proposals:
                open_states.remove(state)
        return batch

    def _try(self, laboratory: Laboratory, journal: Journal, batch: Sequence[Candidate]) -> None:
        """Measure candidates, and keep what comes out."""
        for number, outcome in laboratory.measure(batch):
            task, decisions = batch[number]
            if _FULL in outcome.error:
                raise SessionError(
                    "there is no room for compiled schedules",
                    got=outcome.error,
                    hint="All trials are kept: make room, or let TMPDIR name another folder than "
                    f"{tempfile.gettempdir()}, and start the same command again.",
                )
            seconds = None if outcome.error else outcome.value
            _keep(journal, batch[number], seconds, outcome.error)
            self._by_workload[task.workload].note(decisions, seconds)
            self._on_news(self)

    def _chosen(self, laboratory: Laboratory, journal: Journal) -> Iterator[Record]:
        """Choose a schedule for each kernel."""
        for state in self.states:
            if state.default_seconds is not None:
                yield self._choice(state, laboratory, journal)
                self._on_news(self)

    def _choice(self, state: TaskState, laboratory: Laboratory, journal: Journal) -> Record:
        """Measure the best schedules of a kernel against its default, in turns, and choose one."""
        default = Candidate(state.task, state.task.default)
        known = [state.default_seconds or math.inf]
        contenders = [default]
        for decisions, time_known in state.search.best[:_CONTENDERS]:
            if time_known < _WORTH * known[0]:
                contenders.append(Candidate(state.task, decisions))
                known.append(time_known)
        best, times = 0, known
        if len(contenders) > 1:
            again = laboratory.measure_in_turns(contenders, _ROUNDS)
            # What disturbs a measurement only adds to it: the shorter time is the truer one.
            times = [min(pair) for pair in zip(known, again, strict=True)]
            for number in sorted(range(1, len(contenders)), key=times.__getitem__):
                if times[number] >= _WORTH * times[0]:
                    break
                problem = laboratory.check(number, contenders[number])
                if not problem:
                    best = number
                    break
                _keep(journal, contenders[number], None, problem)
                state.search.tell(contenders[number].decisions, None)
        return Record(
            workload=state.task.workload,
            kernel=state.task.kernel,
            rule=state.task.rule,
            decisions=contenders[best].decisions,
            seconds=times[best],
            default_seconds=times[0],
            trials=state.trials,
        )

    def _about(self) -> About:
        return About(
            **dataclasses.asdict(self.setting),
            commit=self._commit,
            trials=self.trials,
            date=time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime()),
        )


def _keep(journal: Journal, candidate: Candidate, seconds: float | None, error: str) -> None:
    journal.append(
        {
            "workload": candidate.task.workload,
            "decisions": candidate.decisions,
            "seconds": seconds,
            "error": error,
        }
    )
