"""How many schedules a minute are compiled and measured, beside TVM's own builder and runner."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from typing import Any

import tvm
from tvm.target import Target

from dcnv3_tvm import machine, schedules, targets
from dcnv3_tvm.bench.cases import stage_specs
from dcnv3_tvm.errors import CompileError
from dcnv3_tvm.runtime.library import default_threads
from dcnv3_tvm.tuning.devices import local_device
from dcnv3_tvm.tuning.laboratory import Candidate, Laboratory
from dcnv3_tvm.tuning.search import Search
from dcnv3_tvm.tuning.tasks import operator_task


def trial_rates(count: int, on_step: Callable[[str], None] = lambda _: None) -> dict[str, Any]:
    """Compile and measure schedules of the operator of InternImage-T's third stage.

    Both have as many processes to compile with as there are cores, and measure one schedule at a
    time, 40 calls each, with flushed caches.

    Parameters
    ----------
    count : int
        Schedules; where there are fewer, they are repeated.
    on_step : callable
        Called with what happens next.

    Returns
    -------
    dict
        Plain values: the operator, the number, and for ``ours`` and ``stock`` the seconds and the
        trials a minute.
    """
    target = targets.resolve_target("auto")
    spec = stage_specs("internimage_t")[2]
    task = operator_task(spec, target)
    known = [Candidate(task, decisions) for decisions in Search(task.space).propose(task.size)]
    batch = list(itertools.islice(itertools.cycle(known), count))
    on_step("this library")
    ours = _ours(batch, target)
    on_step("MetaSchedule's LocalBuilder and LocalRunner")
    stock = _stock(batch, target)
    return {
        "operator": spec.slug,
        "trials": count,
        "ours": {"seconds": ours, "trials_per_minute": 60 * count / ours},
        "stock": {"seconds": stock, "trials_per_minute": 60 * count / stock},
    }


def _ours(batch: list[Candidate], target: Target) -> float:
    device = local_device(target, threads=default_threads())
    begin = time.monotonic()
    with Laboratory(target, device, builders=len(machine.usable_cores())) as laboratory:
        _check(outcome.error for _, outcome in laboratory.measure(batch))
    return time.monotonic() - begin


def _stock(batch: list[Candidate], target: Target) -> float:
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
