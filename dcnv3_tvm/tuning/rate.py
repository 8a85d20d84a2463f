"""How many schedules a minute are compiled and measured, beside TVM's own builder and runner."""

from __future__ import annotations

import dataclasses
import itertools
import os
import time
from collections.abc import Callable
from typing import Any, ClassVar

import tvm
from tvm.target import Target

from dcnv3_tvm import machine, schedules, targets
from dcnv3_tvm.bench.cases import stage_specs
from dcnv3_tvm.bench.listing import Listing
from dcnv3_tvm.bench.provenance import Provenance
from dcnv3_tvm.environment import TVM_NUM_THREADS
from dcnv3_tvm.errors import CompileError
from dcnv3_tvm.tuning.devices import local_device
from dcnv3_tvm.tuning.laboratory import Candidate, Laboratory
from dcnv3_tvm.tuning.search import Search
from dcnv3_tvm.tuning.tasks import operator_task


@dataclasses.dataclass(frozen=True)
class Rate:
    """How fast schedules are tried.

    Parameters
    ----------
    by : str
        What tries them.
    trials : int
        Schedules compiled and measured.
    seconds : float
        Of all of them, from the start of the processes that do it.
    trials_per_minute : float
        By these.
    """

    by: str
    trials: int
    seconds: float
    trials_per_minute: float


@dataclasses.dataclass(frozen=True)
class RateListing(Listing[Rate]):
    """Rates beside each other."""

    KIND: ClassVar[str] = "trials"
    HEADER: ClassVar[tuple[str, ...]] = ("by", "trials", "seconds", "trials a minute")

    def cells(self) -> list[tuple[str, ...]]:
        """Return the rows of a table for people, under `HEADER`."""
        return [
            (row.by, f"{row.trials:6d}", f"{row.seconds:7.1f}", f"{row.trials_per_minute:15.0f}")
            for row in self.rows
        ]


def list_rates(
    count: int, *, threads: int, on_step: Callable[[str], None] = lambda _: None
) -> RateListing:
    """Compile and measure schedules of the operator of InternImage-T's third stage.

    Parameters
    ----------
    count : int
        Schedules; where there are fewer, they are repeated.
    threads : int
        To compute with.
    on_step : callable
        Called with what happens next.
    """
    target = targets.resolve_target("auto")
    spec = stage_specs("internimage_t")[2]
    task = operator_task(spec, target)
    known = [Candidate(task, decisions) for decisions in Search(task.space).propose(task.size)]
    batch = list(itertools.islice(itertools.cycle(known), count))
    rows = []
    for name, measure in (("dcnv3-tvm", _ours), ("MetaSchedule's builder and runner", _stock)):
        on_step(name)
        seconds = measure(batch, target, threads)
        rows.append(Rate(name, count, seconds, 60 * count / seconds))
    return RateListing(
        slug=spec.slug,
        provenance=Provenance.here(threads),
        how="The same schedules, in one batch, by as many processes that compile as there are "
        "cores; one measured at a time, 40 calls, with flushed caches. The start of the processes "
        "is included.",
        rows=tuple(rows),
    )


def _ours(batch: list[Candidate], target: Target, threads: int) -> float:
    device = local_device(target, threads=threads)
    begin = time.monotonic()
    with Laboratory(target, device, builders=len(machine.usable_cores())) as laboratory:
        _check(outcome.error for _, outcome in laboratory.measure(batch))
    return time.monotonic() - begin


def _stock(batch: list[Candidate], target: Target, threads: int) -> float:
    # Its processes take their threads from here.
    os.environ[TVM_NUM_THREADS.name] = str(threads)
    from tvm.s_tir.meta_schedule.arg_info import TensorInfo
    from tvm.s_tir.meta_schedule.builder import BuilderInput, LocalBuilder
    from tvm.s_tir.meta_schedule.runner import EvaluatorConfig, LocalRunner, RunnerInput

    def module(candidate: Candidate) -> tvm.IRModule:
        found = schedules.schedule(candidate.task.function, target, candidate.decisions)
        return tvm.IRModule({"main": found.function.with_attr("global_symbol", "main")})

    begin = time.monotonic()
    built = LocalBuilder(max_workers=len(machine.usable_cores()), timeout_sec=300).build(
        [BuilderInput(module(candidate), target) for candidate in batch]
    )
    _check(result.error_msg for result in built)
    arguments = [TensorInfo(dtype, shape) for shape, dtype in batch[0].task.arguments]
    evaluator = EvaluatorConfig(number=1, repeat=40, enable_cpu_cache_flush=True)
    futures = LocalRunner(timeout_sec=300, evaluator_config=evaluator).run(
        [RunnerInput(result.artifact_path, "cpu", arguments) for result in built]
    )
    _check(future.result().error_msg for future in futures)
    return time.monotonic() - begin


def _check(errors: Any) -> None:
    """Refuse to give a time of schedules that did not work."""
    found = [error for error in errors if error]
    if found:
        raise CompileError("schedules do not work", got=str(found[0]).strip().splitlines()[-1])
