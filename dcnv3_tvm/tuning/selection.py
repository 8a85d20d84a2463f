"""Final selection: remeasure the best schedules of a kernel and check the winner's result."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Final

from dcnv3_tvm.schedules.records import Record
from dcnv3_tvm.schedules.space import Decision
from dcnv3_tvm.tuning.measurer import Measurer
from dcnv3_tvm.tuning.task_state import MAX_RATIO, TaskState
from dcnv3_tvm.tuning.tasks import Candidate
from dcnv3_tvm.tuning.trial_log import TrialLog

_FINALISTS: Final = 3
"""Best schedules of a kernel that are remeasured together with the default."""

_ROUNDS: Final = 3


def expected_measurements(states: Iterable[TaskState]) -> int:
    """Estimate the number of measurements that the selection takes."""
    improved = sum(state.speedup > 1 for state in states)
    return improved * (_FINALISTS + 1) * _ROUNDS


def select_schedule(state: TaskState, measurer: Measurer, log: TrialLog) -> Record:
    """Choose between the default and the best schedules of a kernel.

    A schedule with a wrong result is logged as a failed trial and not chosen.
    """
    default_seconds = state.default_seconds or math.inf
    candidates = [Candidate(state.task, state.task.default)]
    times = [default_seconds]
    for decisions, seconds in state.search.best[:_FINALISTS]:
        if seconds < MAX_RATIO * default_seconds:
            candidates.append(Candidate(state.task, decisions))
            times.append(seconds)
    if len(candidates) == 1:
        return _record(state, state.task.default, default_seconds, default_seconds)
    remeasured = measurer.measure_in_turns(candidates, _ROUNDS)
    # Disturbances only make a measurement longer.
    times = [min(pair) for pair in zip(times, remeasured, strict=True)]
    for number in sorted(range(1, len(candidates)), key=times.__getitem__):
        if times[number] >= MAX_RATIO * times[0]:
            break
        error = measurer.check(number, candidates[number])
        if not error:
            return _record(state, candidates[number].decisions, times[number], times[0])
        log.add_trial(candidates[number], None, error)
        state.search.tell(candidates[number].decisions, None)
    return _record(state, state.task.default, times[0], times[0])


def _record(
    state: TaskState, decisions: dict[str, Decision], seconds: float, default_seconds: float
) -> Record:
    return Record(
        workload=state.task.workload,
        kernel=state.task.kernel,
        rule=state.task.rule,
        decisions=decisions,
        seconds=seconds,
        default_seconds=default_seconds,
        trials=state.trials,
    )
