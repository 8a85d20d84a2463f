"""Tune models and operators in one call."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from dcnv3_tvm import machine, targets
from dcnv3_tvm.compiler.compile import check_dtype
from dcnv3_tvm.errors import InvalidArgumentError
from dcnv3_tvm.provenance import Provenance
from dcnv3_tvm.runtime.library import default_threads
from dcnv3_tvm.spec import DCNv3Spec
from dcnv3_tvm.tuning.devices import Devices, local_device, remote_devices
from dcnv3_tvm.tuning.journal import SessionError
from dcnv3_tvm.tuning.laboratory import Candidate, Laboratory
from dcnv3_tvm.tuning.session import Budget, Session, Setting
from dcnv3_tvm.tuning.state import TaskState
from dcnv3_tvm.tuning.summary import summarize, write_summary
from dcnv3_tvm.tuning.tasks import Task, merged, model_tasks, operator_task

if TYPE_CHECKING:
    from tvm.target import Target

    from dcnv3_tvm.imported_model import ImportedModel

TRIALS_PER_KERNEL: Final = 40
"""Trials of a session that is not told how many, by kernel, as far as there are schedules."""


@dataclasses.dataclass(frozen=True)
class Tracker:
    """Servers that have registered with TVM's RPC tracker, to measure on.

    Parameters
    ----------
    host : str
        Of the tracker.
    port : int
        Of the tracker.
    key : str
        Under which the servers have registered.
    workers : int
        Measurements at a time: the number of servers.
    """

    host: str
    port: int
    key: str
    workers: int = 1


@dataclasses.dataclass(frozen=True)
class TuneConfig:
    """How to tune.

    Parameters
    ----------
    target : str
        As for `dcnv3_tvm.compile_model`. Without a tracker it must be one that this machine runs.
    dtype : str
        Element type of the products of models; an operator has its own.
    trials : int, optional
        Schedules to try, earlier sessions in the work directory included; by default
        `TRIALS_PER_KERNEL` for each kernel.
    minutes : float, optional
        After which the session ends.
    threads : int, optional
        Of the processor that measures; by default as a compiled model has.
    device : int
        Number of the GPU.
    tracker : Tracker, optional
        Measure on other machines.
    """

    target: str = "auto"
    dtype: str = "float32"
    trials: int | None = None
    minutes: float | None = None
    threads: int | None = None
    device: int = 0
    tracker: Tracker | None = None

    def __post_init__(self) -> None:
        for name in ("trials", "minutes", "threads"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise InvalidArgumentError(f"{name} is out of range", got=value, allowed="above 0")


def tune(
    what: Sequence[ImportedModel | DCNv3Spec],
    work_dir: str | os.PathLike[str],
    config: TuneConfig | None = None,
    *,
    on_news: Callable[[Session], None] = lambda _: None,
) -> dict[str, Any]:
    """Tune the kernels of models and operators, and keep the best schedules.

    The work directory then holds ``records``, which `dcnv3_tvm.compile_model` takes as `database`,
    and ``summary.json``. A session that was ended by whatever means is taken up again by the same
    call.

    Parameters
    ----------
    what : sequence of ImportedModel or DCNv3Spec
        What to tune together: a kernel that is called more often counts for more.
    work_dir : path
        The work directory; it is made if it is not there.
    config : TuneConfig, optional
        How.
    on_news : callable, optional
        Called with the session whenever something has changed, for showing it.

    Returns
    -------
    dict
        What was found, as `dcnv3_tvm.tuning.summary.summarize` puts it.

    Raises
    ------
    InvalidArgumentError
        If there is nothing to tune, or a size is not fixed.
    TargetError
        If this machine cannot run code for the target, or it does not take `dtype`.
    SessionError
        If the session cannot start or go on; what was measured is kept.

    Notes
    -----
    Schedules are compiled and measured in other processes, which import the main module of a
    script: call this under ``if __name__ == "__main__":``.
    """
    config = config or TuneConfig()
    target = targets.resolve_target(config.target)
    tasks = list_tasks(what, target, config.dtype)
    trials = _trials(tasks, config)
    devices, setting, commit = _circumstances(target, config)
    session = Session(
        Path(work_dir),
        tasks,
        setting,
        Budget(trials, config.minutes),
        commit=commit,
        on_news=on_news,
    )
    with Laboratory(target, devices, builders=_builders()) as laboratory:
        records = session.run(laboratory)
    summary = summarize(session, records)
    try:
        write_summary(summary, session.directory)
    except OSError as error:
        raise SessionError(
            "the summary cannot be written",
            got=f"{error.strerror} ({session.directory})",
            hint="The records are written.",
        ) from error
    return summary


def estimate(
    what: Sequence[ImportedModel | DCNv3Spec], config: TuneConfig | None = None
) -> dict[str, Any]:
    """Say what `tune` would do: time each kernel once, by default, and write nothing.

    Parameters
    ----------
    what, config
        As for `tune`.

    Returns
    -------
    dict
        Plain values: ``kernels``, those that take longest first, with ``calls``, ``space`` (the
        number of schedules), ``seconds`` and ``share``; ``trials``; and ``minutes``, which as many
        trials would take.
    """
    config = config or TuneConfig()
    target = targets.resolve_target(config.target)
    tasks = list_tasks(what, target, config.dtype)
    devices, _, _ = _circumstances(target, config)
    states = [TaskState(task) for task in tasks]
    batch = [Candidate(task, task.default) for task in tasks]
    started = time.monotonic()
    with Laboratory(target, devices, builders=_builders()) as laboratory:
        for number, outcome in laboratory.measure(batch):
            states[number].note(batch[number].decisions, None if outcome.error else outcome.value)
    seconds_per_trial = (time.monotonic() - started) / len(batch)
    total = sum(state.default_total for state in states)
    trials = _trials(tasks, config)
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


def list_tasks(what: Sequence[ImportedModel | DCNv3Spec], target: Target, dtype: str) -> list[Task]:
    """List the kernels of models and operators, each once.

    Raises
    ------
    InvalidArgumentError
        If there is none whose schedule leaves something to decide.
    """
    check_dtype(dtype, target)
    found: list[Task] = []
    for item in what:
        if isinstance(item, DCNv3Spec):
            found.append(operator_task(item, target))
        else:
            found += model_tasks(item, target, dtype)
    tasks = merged(found)
    if not tasks:
        raise InvalidArgumentError("there is nothing to tune", got=f"{len(what)} items")
    return tasks


def _trials(tasks: Sequence[Task], config: TuneConfig) -> int:
    return min(sum(task.size for task in tasks), config.trials or TRIALS_PER_KERNEL * len(tasks))


def _builders() -> int:
    return len(machine.usable_cores())


def _circumstances(target: Target, config: TuneConfig) -> tuple[Devices, Setting, str | None]:
    threads = config.threads or default_threads()
    where = Provenance.here(threads)
    tracker = config.tracker
    if tracker is not None:
        devices = remote_devices(
            target,
            (tracker.host, tracker.port),
            tracker.key,
            workers=tracker.workers,
            threads=threads,
        )
    else:
        devices = local_device(target, threads=threads, index=config.device)
    on_this_processor = tracker is None and not targets.is_gpu(target)
    hardware = where.cpu if on_this_processor else devices.name
    return devices, Setting.of(target, hardware=hardware, cores=threads), where.commit
