"""Tune models and operators with one call."""

from __future__ import annotations

import dataclasses
import math
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from dcnv3_tvm import targets
from dcnv3_tvm.errors import InvalidArgumentError, TuningError
from dcnv3_tvm.machine import usable_cores
from dcnv3_tvm.provenance import git_commit
from dcnv3_tvm.runtime.library import default_threads
from dcnv3_tvm.tuning.context import MeasurementContext
from dcnv3_tvm.tuning.device_pool import DevicePool, local_device, remote_devices
from dcnv3_tvm.tuning.measurer import MEASURE_TIMEOUT, Measurer
from dcnv3_tvm.tuning.rpc import RpcConfig
from dcnv3_tvm.tuning.session import TuningBudget, TuningSession
from dcnv3_tvm.tuning.summary import summarize, write_summary
from dcnv3_tvm.tuning.task_state import TaskState
from dcnv3_tvm.tuning.tasks import Candidate, TuningTask, list_tasks

if TYPE_CHECKING:
    from tvm.target import Target

    from dcnv3_tvm.imported_model import ImportedModel
    from dcnv3_tvm.spec import DCNv3Spec

TRIALS_PER_KERNEL: Final = 40
"""Default number of trials per kernel."""


@dataclasses.dataclass(frozen=True)
class TuneConfig:
    """Options of `tune`.

    Parameters
    ----------
    target : str
        As for `dcnv3_tvm.compile_model`. Without `rpc`, this machine must be able to run it.
    dtype : str
        Element type of matmul operands in models; an operator has its own.
    trials : int, optional
        Total number of trials, earlier sessions in the work directory included;
        `TRIALS_PER_KERNEL` per kernel by default, and never more than there are schedules.
    minutes : float, optional
        Time limit of the session.
    timeout : float
        Seconds after which a measurement is killed and counts as failed.
    threads : int, optional
        CPU threads of a measured kernel; by default those of a compiled model.
    device : int
        Index of the GPU.
    rpc : RpcConfig, optional
        Measure on remote devices.
    backward : bool
        Tune the gradient kernels of operators, too.

    Raises
    ------
    InvalidArgumentError
        If a number is not positive.
    """

    target: str = "auto"
    dtype: str = "float32"
    trials: int | None = None
    minutes: float | None = None
    timeout: float = MEASURE_TIMEOUT
    threads: int | None = None
    device: int = 0
    rpc: RpcConfig | None = None
    backward: bool = False

    def __post_init__(self) -> None:
        for name in ("trials", "minutes", "timeout", "threads"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise InvalidArgumentError(f"{name} is out of range", got=value, allowed="above 0")


def tune(
    models: Sequence[ImportedModel | DCNv3Spec],
    work_dir: str | os.PathLike[str],
    config: TuneConfig | None = None,
    *,
    on_update: Callable[[TuningSession], None] = lambda _: None,
) -> dict[str, Any]:
    """Tune the kernels of models and operators.

    Afterwards the work directory holds ``records``, which `dcnv3_tvm.compile_model` accepts as
    `database`, and ``summary.json``. Repeating the call continues a session that was killed or
    interrupted.

    Parameters
    ----------
    models : sequence of ImportedModel or DCNv3Spec
        Models and operators that share the budget: kernels with more calls get more trials.
    work_dir : path
        The work directory; it is created if missing.
    config : TuneConfig, optional
        Options.
    on_update : callable, optional
        Called with the session after every change, to display it.

    Returns
    -------
    dict
        The result of `dcnv3_tvm.tuning.summary.summarize`.

    Raises
    ------
    InvalidArgumentError
        If there is nothing to tune, a shape is dynamic, or the work directory belongs to a session
        on another device or holds something else.
    TargetError
        If this machine cannot run code for the target, or the target does not support `dtype`.
    TuningError
        If the session cannot start or continue; all measured trials are kept.

    Notes
    -----
    Candidates are built and measured in subprocesses, which import the main module of a script:
    call this under ``if __name__ == "__main__":``.
    """
    config = config or TuneConfig()
    target = targets.resolve_target(config.target)
    tasks = list_tasks(models, target, config.dtype, backward=config.backward)
    threads = config.threads or default_threads()
    devices = _devices(target, config, threads)
    session = TuningSession(
        Path(work_dir),
        tasks,
        MeasurementContext.of(target, hardware=devices.hardware, cores=threads),
        TuningBudget(_max_trials(tasks, config), config.minutes),
        commit=git_commit(),
        on_update=on_update,
    )
    with _measurer(target, devices, config) as measurer:
        records = session.run(measurer)
    summary = summarize(session, records)
    try:
        write_summary(summary, session.directory)
    except OSError as error:
        raise TuningError(
            "the summary cannot be written",
            got=f"{error.strerror} ({session.directory})",
            hint="The records have been written.",
        ) from error
    return summary


def estimate(
    models: Sequence[ImportedModel | DCNv3Spec], config: TuneConfig | None = None
) -> dict[str, Any]:
    """Estimate the duration of `tune`: time each default schedule once, and write nothing.

    Parameters
    ----------
    models, config
        As for `tune`.

    Returns
    -------
    dict
        Values that JSON can represent: ``kernels``, by decreasing share of the time, with
        ``calls``, ``space`` (the number of schedules), ``seconds`` and ``share``; ``trials``; and
        the estimated ``minutes``.
    """
    config = config or TuneConfig()
    target = targets.resolve_target(config.target)
    tasks = list_tasks(models, target, config.dtype, backward=config.backward)
    devices = _devices(target, config, config.threads or default_threads())
    states = [TaskState(task) for task in tasks]
    batch = [Candidate(task, task.default) for task in tasks]
    started = time.monotonic()
    with _measurer(target, devices, config) as measurer:
        for number, result in measurer.measure(batch):
            seconds = None if result.error else result.value
            states[number].add_trial(batch[number].decisions, seconds)
    seconds_per_trial = (time.monotonic() - started) / len(batch)
    total = sum(state.default_total for state in states)
    trials = _max_trials(tasks, config)
    minutes = trials * seconds_per_trial / 60
    return {
        "target": targets.target_slug(target),
        "trials": trials,
        "minutes": min(minutes, config.minutes or minutes),
        "kernels": [
            {
                "kernel": state.task.kernel,
                "rule": state.task.rule,
                "calls": state.task.calls,
                "space": state.task.size,
                "seconds": state.default_seconds,
                "share": state.default_total / total if total else 0,
            }
            for state in sorted(states, key=lambda state: -state.default_total)
        ],
    }


def _max_trials(tasks: Sequence[TuningTask], config: TuneConfig) -> int:
    return min(sum(task.size for task in tasks), config.trials or TRIALS_PER_KERNEL * len(tasks))


def _measurer(target: Target, devices: DevicePool, config: TuneConfig) -> Measurer:
    return Measurer(target, devices, builders=len(usable_cores()), timeout=config.timeout)


def _devices(target: Target, config: TuneConfig, threads: int) -> DevicePool:
    if config.rpc is not None:
        return remote_devices(target, config.rpc, threads=threads)
    return local_device(target, threads=threads, index=config.device)
