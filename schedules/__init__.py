"""Schedules: TensorIR functions in, TensorIR functions that run fast on the target out.

A rule is a function ``rule(func, target, space)`` that returns the scheduled function, or
``None`` when it does not know the kernel. One rule a file, in one folder a kind of target. What a
tuner may decide otherwise, a rule asks of `dcnv3_tvm.schedules.space.SearchSpace`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Final

from tvm import tirx
from tvm.ir import IRModule
from tvm.s_tir.schedule import ScheduleError
from tvm.target import Target

from dcnv3_tvm.errors import CompileError
from dcnv3_tvm.schedules.cpu.convolution import convolution
from dcnv3_tvm.schedules.cpu.dcnv3 import dcnv3
from dcnv3_tvm.schedules.cpu.depthwise import depthwise
from dcnv3_tvm.schedules.cpu.dot_product import has_bfloat16_dot
from dcnv3_tvm.schedules.cpu.fallback import fallback
from dcnv3_tvm.schedules.cpu.layer_norm import layer_norm
from dcnv3_tvm.schedules.cpu.matmul import matmul
from dcnv3_tvm.schedules.cpu.register_tiles import weight_tile_width
from dcnv3_tvm.schedules.gpu.dcnv3 import dcnv3 as gpu_dcnv3
from dcnv3_tvm.schedules.gpu.depthwise import depthwise as gpu_depthwise
from dcnv3_tvm.schedules.gpu.fallback import fallback as gpu_fallback
from dcnv3_tvm.schedules.gpu.gemm import gemm
from dcnv3_tvm.schedules.gpu.layer_norm import layer_norm as gpu_layer_norm
from dcnv3_tvm.schedules.gpu.mlp import mlp
from dcnv3_tvm.schedules.gpu.tensorize import tensorize
from dcnv3_tvm.schedules.gpu.threads import check_launch
from dcnv3_tvm.schedules.records import Records
from dcnv3_tvm.schedules.space import Decision, DecisionError, SearchSpace
from dcnv3_tvm.targets import is_gpu, target_slug

__all__ = [
    "CPU_RULES",
    "GPU_RULES",
    "HIT",
    "MISS",
    "SCHEDULED",
    "UNSCHEDULED",
    "Scheduled",
    "has_bfloat16_dot",
    "rules_for",
    "schedule",
    "schedule_by_record",
    "schedule_module",
    "weight_tile_width",
]

Rule = Callable[[tirx.PrimFunc, Target, SearchSpace], tirx.PrimFunc | None]

CPU_RULES: Final[tuple[Rule, ...]] = (
    dcnv3,
    matmul,
    convolution,
    depthwise,
    layer_norm,
    fallback,
)
"""Rules for LLVM targets, in the order in which they are tried."""

GPU_RULES: Final[tuple[Rule, ...]] = (
    gpu_dcnv3,
    gemm,
    mlp,
    gpu_depthwise,
    gpu_layer_norm,
    gpu_fallback,
)
"""Rules for CUDA targets, in the order in which they are tried."""

SCHEDULED: Final = "tirx.is_scheduled"
"""Function attribute of a kernel that is not to be scheduled again."""

_SYMBOL: Final = "global_symbol"

UNSCHEDULED: Final = "unscheduled"
"""Name recorded for a CPU kernel that no rule could schedule; it runs as it was written."""


def rules_for(target: Target) -> tuple[Rule, ...]:
    """Return the rules for a target, in the order in which they are tried."""
    return GPU_RULES if is_gpu(target) else CPU_RULES


@dataclasses.dataclass(frozen=True)
class Scheduled:
    """A kernel and its schedule.

    Parameters
    ----------
    function : tvm.tirx.PrimFunc
        The scheduled function.
    rule : str
        Name of the rule that took it, or `UNSCHEDULED`.
    space : dict of str to tuple of Decision
        The decisions of the rule, and what each may be, its default first.
    record : str
        ``"hit"`` where a tuning record decided; else why none did: ``"miss"``, or what is wrong
        with the one that is there; empty where none was looked for, or nothing is to be decided.
    """

    function: tirx.PrimFunc
    rule: str
    space: Mapping[str, tuple[Decision, ...]]
    record: str = ""


HIT: Final = "hit"
"""What is recorded for a kernel on which a tuning record decided."""

MISS: Final = "miss"
"""What is recorded for a kernel that has no tuning record."""


def schedule(
    func: tirx.PrimFunc, target: Target, given: Mapping[str, Decision] | None = None
) -> Scheduled:
    """Schedule a kernel.

    Parameters
    ----------
    func : tvm.tirx.PrimFunc
        Unscheduled.
    target : tvm.target.Target
        What it is compiled for.
    given : mapping of str to Decision, optional
        Decisions to take instead of the rule's own, by name.

    Raises
    ------
    DecisionError
        If the rule cannot take these decisions.
    CompileError
        If no rule takes a kernel for a GPU, where code without a schedule cannot run.
    """
    for rule in rules_for(target):
        space = SearchSpace(given or {})
        try:
            result = rule(func, target, space)
            if result is not None and given and is_gpu(target):
                check_launch(result)
        except ScheduleError as error:
            if given:
                raise DecisionError(
                    f"the rule {rule.__name__} cannot schedule the kernel so",
                    got=", ".join(f"{name}={value}" for name, value in given.items()),
                ) from error
            continue
        if result is not None:
            space.check_all_asked()
            return Scheduled(_named_like(func, result), rule.__name__, space.candidates)
    if is_gpu(target):
        raise CompileError(
            "no schedule rule takes this kernel",
            got=str(func.attrs.get(_SYMBOL) if func.attrs else func),
            hint=f"Kernels for {target_slug(target)} must be scheduled; please report it.",
        )
    return Scheduled(func, UNSCHEDULED, {})


def schedule_by_record(func: tirx.PrimFunc, target: Target, records: Records) -> Scheduled:
    """Schedule a kernel as its tuning record says, or by the rule's own decisions without one."""
    record = records.find(func)
    if record is None:
        found = schedule(func, target)
        return dataclasses.replace(found, record=MISS) if found.space else found
    try:
        found = schedule(func, target, record.decisions)
    except DecisionError as error:
        return dataclasses.replace(schedule(func, target), record=str(error))
    return dataclasses.replace(found, record=HIT)


def schedule_module(
    mod: IRModule,
    target: Target,
    *,
    intrinsics: bool = True,
    records: Records | None = None,
) -> tuple[IRModule, dict[str, Scheduled]]:
    """Schedule every TensorIR function of a module.

    Parameters
    ----------
    mod : IRModule
        Module; its Relax functions, and functions already scheduled, stay as they are.
    target : Target
        Target the module is compiled for.
    intrinsics : bool
        Whether the instructions of tensor cores take the place of the loops that stand for them;
        without, a schedule for a GPU can be run on any processor.
    records : Records, optional
        Tuning records, which decide where they have a kernel.

    Returns
    -------
    IRModule
        A new module.
    dict of str to Scheduled
        How each function was scheduled, by its name.

    Raises
    ------
    CompileError
        If no rule takes a kernel for a GPU, where code without a schedule cannot run.
    """
    scheduled = IRModule(dict(mod.functions_items()), attrs=mod.attrs)
    taken: dict[str, Scheduled] = {}
    for var, func in mod.functions_items():
        if not isinstance(func, tirx.PrimFunc) or (func.attrs and func.attrs.get(SCHEDULED)):
            continue
        found = (
            schedule(func, target) if records is None else schedule_by_record(func, target, records)
        )
        result = tensorize(found.function) if is_gpu(target) and intrinsics else found.function
        scheduled.update_func(var, result.with_attr(SCHEDULED, True))
        taken[var.name_hint] = found
    return scheduled, taken


def _named_like(func: tirx.PrimFunc, scheduled: tirx.PrimFunc) -> tirx.PrimFunc:
    """Give a function its own name again, where a rule has built the kernel anew."""
    symbol = func.attrs.get(_SYMBOL) if func.attrs else None
    plain = scheduled.without_attr(_SYMBOL)
    return plain if symbol is None else plain.with_attr(_SYMBOL, symbol)
