"""Schedules: transform TensorIR kernels into ones that run fast on a target.

One rule a file, in one folder for each kind of target; `dcnv3_tvm.schedules.rule` says what a rule
is and `dcnv3_tvm.schedules.apply` tries them in order.
"""

from dcnv3_tvm.schedules.apply import (
    CPU_RULES,
    GPU_RULES,
    HIT,
    MISS,
    SCHEDULED,
    UNSCHEDULED,
    ScheduledKernel,
    apply_rules,
    rules_for,
    schedule,
    schedule_by_record,
    schedule_module,
)
from dcnv3_tvm.schedules.cpu.register_tiles import row_slack, weight_tile_width
from dcnv3_tvm.schedules.gpu.depthwise import choose_run
from dcnv3_tvm.schedules.rule import Refusal

__all__ = [
    "CPU_RULES",
    "GPU_RULES",
    "HIT",
    "MISS",
    "SCHEDULED",
    "UNSCHEDULED",
    "Refusal",
    "ScheduledKernel",
    "apply_rules",
    "choose_run",
    "row_slack",
    "rules_for",
    "schedule",
    "schedule_by_record",
    "schedule_module",
    "weight_tile_width",
]
