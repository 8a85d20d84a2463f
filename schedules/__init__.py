"""Schedules: TensorIR functions in, TensorIR functions that run fast on the target out.

A rule is a function ``rule(func, target)`` that returns the scheduled function, or ``None`` when
it does not know the kernel. One rule a file, in one folder a kind of target.
"""

from __future__ import annotations

from collections.abc import Callable
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
from dcnv3_tvm.schedules.cpu.linear import linear
from dcnv3_tvm.schedules.cpu.tiling import linear_tile
from dcnv3_tvm.schedules.gpu.dcnv3 import dcnv3 as gpu_dcnv3
from dcnv3_tvm.schedules.gpu.depthwise import depthwise as gpu_depthwise
from dcnv3_tvm.schedules.gpu.fallback import fallback as gpu_fallback
from dcnv3_tvm.schedules.gpu.gemm import gemm
from dcnv3_tvm.schedules.gpu.layer_norm import layer_norm as gpu_layer_norm
from dcnv3_tvm.schedules.gpu.tensorize import tensorize
from dcnv3_tvm.targets import is_gpu, target_slug

__all__ = [
    "CPU_RULES",
    "GPU_RULES",
    "SCHEDULED",
    "UNSCHEDULED",
    "has_bfloat16_dot",
    "linear_tile",
    "rules_for",
    "schedule_module",
]

Rule = Callable[[tirx.PrimFunc, Target], tirx.PrimFunc | None]

CPU_RULES: Final[tuple[Rule, ...]] = (
    dcnv3,
    linear,
    convolution,
    depthwise,
    layer_norm,
    fallback,
)
"""Rules for LLVM targets, in the order in which they are tried."""

GPU_RULES: Final[tuple[Rule, ...]] = (
    gpu_dcnv3,
    gemm,
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


def schedule_module(
    mod: IRModule, target: Target, *, intrinsics: bool = True
) -> tuple[IRModule, dict[str, str]]:
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

    Returns
    -------
    IRModule
        A new module.
    dict of str to str
        Name of the rule that took each function, by the function's name.

    Raises
    ------
    CompileError
        If no rule takes a kernel for a GPU, where code without a schedule cannot run.
    """
    scheduled = IRModule(dict(mod.functions_items()), attrs=mod.attrs)
    taken: dict[str, str] = {}
    for var, func in mod.functions_items():
        if not isinstance(func, tirx.PrimFunc) or (func.attrs and func.attrs.get(SCHEDULED)):
            continue
        result, name = _schedule(func, target)
        if name == UNSCHEDULED and is_gpu(target):
            raise CompileError(
                "no schedule rule takes this kernel",
                got=var.name_hint,
                hint=f"Kernels for {target_slug(target)} must be scheduled; please report it.",
            )
        if is_gpu(target) and intrinsics:
            result = tensorize(result)
        scheduled.update_func(var, result.with_attr(SCHEDULED, True))
        taken[var.name_hint] = name
    return scheduled, taken


def _schedule(func: tirx.PrimFunc, target: Target) -> tuple[tirx.PrimFunc, str]:
    for rule in rules_for(target):
        try:
            result = rule(func, target)
        except ScheduleError:
            continue
        if result is not None:
            return _named_like(func, result), rule.__name__
    return func, UNSCHEDULED


def _named_like(func: tirx.PrimFunc, scheduled: tirx.PrimFunc) -> tirx.PrimFunc:
    """Give a function its own name again, where a rule has built the kernel anew."""
    symbol = func.attrs.get(_SYMBOL) if func.attrs else None
    plain = scheduled.without_attr(_SYMBOL)
    return plain if symbol is None else plain.with_attr(_SYMBOL, symbol)
