"""Apply schedule rules: to one kernel, by tuning record, or to every kernel of a module."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Final

from tvm import tirx
from tvm.ir import IRModule
from tvm.s_tir.schedule import ScheduleError
from tvm.target import Target

from dcnv3_tvm.errors import CompileError
from dcnv3_tvm.schedules.cpu.convolution import convolution
from dcnv3_tvm.schedules.cpu.dcnv3 import dcnv3
from dcnv3_tvm.schedules.cpu.dcnv3_gradient import dcnv3_grad_offset_mask, dcnv3_grad_x
from dcnv3_tvm.schedules.cpu.depthwise import depthwise
from dcnv3_tvm.schedules.cpu.fallback import fallback
from dcnv3_tvm.schedules.cpu.layer_norm import layer_norm
from dcnv3_tvm.schedules.cpu.matmul import matmul
from dcnv3_tvm.schedules.cpu.tile_matmul import tile_matmul
from dcnv3_tvm.schedules.gpu.dcnv3 import dcnv3 as gpu_dcnv3
from dcnv3_tvm.schedules.gpu.dcnv3_gradient import (
    dcnv3_grad_offset_mask as gpu_dcnv3_grad_offset_mask,
)
from dcnv3_tvm.schedules.gpu.dcnv3_gradient import dcnv3_grad_x as gpu_dcnv3_grad_x
from dcnv3_tvm.schedules.gpu.depthwise import depthwise as gpu_depthwise
from dcnv3_tvm.schedules.gpu.fallback import fallback as gpu_fallback
from dcnv3_tvm.schedules.gpu.gemm import gemm
from dcnv3_tvm.schedules.gpu.launch import check_launch
from dcnv3_tvm.schedules.gpu.layer_norm import layer_norm as gpu_layer_norm
from dcnv3_tvm.schedules.gpu.mlp import mlp
from dcnv3_tvm.schedules.gpu.tensorize import tensorize
from dcnv3_tvm.schedules.records import Records
from dcnv3_tvm.schedules.rule import Refusal, Rule
from dcnv3_tvm.schedules.space import Decision, DecisionError, SearchSpace
from dcnv3_tvm.targets import is_gpu, target_slug

CPU_RULES: Final[tuple[Rule, ...]] = (
    dcnv3,
    matmul,
    tile_matmul,
    convolution,
    depthwise,
    layer_norm,
    dcnv3_grad_x,
    dcnv3_grad_offset_mask,
    fallback,
)
"""Rules for LLVM targets, in the order in which they are tried."""

GPU_RULES: Final[tuple[Rule, ...]] = (
    gpu_dcnv3,
    gemm,
    mlp,
    gpu_depthwise,
    gpu_layer_norm,
    gpu_dcnv3_grad_x,
    gpu_dcnv3_grad_offset_mask,
    gpu_fallback,
)
"""Rules for CUDA targets, in the order in which they are tried."""

SCHEDULED: Final = "tirx.is_scheduled"
"""Function attribute of kernels that `schedule_module` skips."""

UNSCHEDULED: Final = "unscheduled"
"""`ScheduledKernel.rule` of a kernel to which no rule applies."""

HIT: Final = "hit"
"""`ScheduledKernel.record` of a kernel that was scheduled by a tuning record."""

MISS: Final = "miss"
"""`ScheduledKernel.record` of a kernel without a tuning record."""


@dataclasses.dataclass(frozen=True)
class ScheduledKernel:
    """A kernel and how it was scheduled.

    Parameters
    ----------
    function : tvm.tirx.PrimFunc
        The scheduled function; the unscheduled one if no rule applies.
    rule : str
        Name of the rule that scheduled it, or `UNSCHEDULED`.
    space : dict of str to tuple of Decision
        Candidates of each decision of the rule, its default first.
    record : str
        `HIT`, `MISS`, or why the kernel's tuning record cannot be used. Empty if records were not
        consulted or the rule has no decisions.
    refusals : dict of str to str
        Rules tried before `rule`, and why each does not apply.
    """

    function: tirx.PrimFunc
    rule: str
    space: Mapping[str, tuple[Decision, ...]]
    record: str = ""
    refusals: Mapping[str, str] = dataclasses.field(default_factory=dict)


def rules_for(target: Target) -> tuple[Rule, ...]:
    """Return the rules for a target, in the order in which they are tried."""
    return GPU_RULES if is_gpu(target) else CPU_RULES


def apply_rules(
    func: tirx.PrimFunc, target: Target, decisions: Mapping[str, Decision] | None = None
) -> ScheduledKernel:
    """Schedule a kernel by the first rule that applies.

    Parameters
    ----------
    func : tvm.tirx.PrimFunc
        Unscheduled kernel.
    target : tvm.target.Target
        Target to schedule for.
    decisions : mapping of str to Decision, optional
        Decisions to take instead of the rule's defaults, by name.

    Returns
    -------
    ScheduledKernel
        Its `rule` is `UNSCHEDULED` if no rule applies.

    Raises
    ------
    DecisionError
        If the rule that applies cannot take these decisions.
    """
    refusals: dict[str, str] = {}
    for rule in rules_for(target):
        space = SearchSpace(decisions or {})
        try:
            result = rule(func, target, space)
        except ScheduleError as error:
            if decisions:
                raise DecisionError(
                    f"the rule {rule.__name__} cannot schedule the kernel with these decisions",
                    got=", ".join(f"{name}={value}" for name, value in decisions.items()),
                ) from error
            last_line = str(error).strip().splitlines()[-1]
            result = Refusal(f"a schedule primitive fails: {last_line}")
        if isinstance(result, Refusal):
            refusals[rule.__name__] = result.reason
            continue
        if decisions and is_gpu(target):
            check_launch(result)
        space.check_all_used()
        return ScheduledKernel(result, rule.__name__, space.candidates, refusals=refusals)
    return ScheduledKernel(func, UNSCHEDULED, {}, refusals=refusals)


def schedule(
    func: tirx.PrimFunc, target: Target, decisions: Mapping[str, Decision] | None = None
) -> ScheduledKernel:
    """Schedule a kernel so that it runs on its target.

    Parameters
    ----------
    func, target, decisions
        As for `apply_rules`.

    Returns
    -------
    ScheduledKernel

    Raises
    ------
    DecisionError
        If the rule that applies cannot take these decisions.
    CompileError
        If no rule applies and the target is a GPU, which cannot run an unscheduled kernel.
    """
    found = apply_rules(func, target, decisions)
    if found.rule == UNSCHEDULED and is_gpu(target):
        raise CompileError(
            "no schedule rule applies to this kernel",
            got=str(func.attrs.get("global_symbol") if func.attrs else func),
            hint=f"Kernels for {target_slug(target)} must be scheduled; please report it.",
        )
    return found


def schedule_by_record(func: tirx.PrimFunc, target: Target, records: Records) -> ScheduledKernel:
    """Schedule a kernel with the decisions of its tuning record, or with the defaults.

    Parameters
    ----------
    func, target
        As for `schedule`.
    records : Records
        Tuning records for the target.

    Returns
    -------
    ScheduledKernel
        Its `record` says whether a record was used, and otherwise why not.
    """
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
) -> tuple[IRModule, dict[str, ScheduledKernel]]:
    """Schedule every TensorIR function of a module.

    Parameters
    ----------
    mod : IRModule
        Module; its Relax functions, and functions already scheduled, are left unchanged.
    target : Target
        Target to schedule for.
    intrinsics : bool
        Whether to replace loops by tensor-core intrinsics. Without them, a schedule for a GPU can
        be simulated on a CPU.
    records : Records, optional
        Tuning records to schedule by.

    Returns
    -------
    IRModule
        A new module.
    dict of str to ScheduledKernel
        How each function was scheduled, by its name.

    Raises
    ------
    CompileError
        If no rule applies to a kernel for a GPU.
    """
    scheduled = IRModule(dict(mod.functions_items()), attrs=mod.attrs)
    kernels: dict[str, ScheduledKernel] = {}
    for var, func in mod.functions_items():
        if not isinstance(func, tirx.PrimFunc) or (func.attrs and func.attrs.get(SCHEDULED)):
            continue
        if records is None:
            found = schedule(func, target)
        else:
            found = schedule_by_record(func, target, records)
        result = tensorize(found.function) if is_gpu(target) and intrinsics else found.function
        scheduled.update_func(var, result.with_attr(SCHEDULED, True))
        kernels[var.name_hint] = found
    return scheduled, kernels
