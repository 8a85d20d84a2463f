"""Stock TVM operators on CPUs, and every other kernel without a rule of its own."""

from __future__ import annotations

import contextlib
import math
from typing import Final

from tvm import s_tir, tirx
from tvm.s_tir.schedule import LoopRV, SBlockRV, ScheduleError
from tvm.target import Target

from dcnv3_tvm.op.expr import static
from dcnv3_tvm.schedules.blocks import plain_axes, reduces
from dcnv3_tvm.schedules.cpu.loops import vector_width
from dcnv3_tvm.schedules.cpu.register_tiles import (
    VectorUnit,
    vector_unit,
)
from dcnv3_tvm.schedules.rule import Refusal
from dcnv3_tvm.schedules.space import SearchSpace

_SERIAL_WORK: Final = 65536
"""Iterations below which waking other threads takes longer than the loop."""

_ENOUGH_TASKS: Final = 16
"""Outer iterations with which the cores are balanced without splitting the innermost loop."""


def fallback(func: tirx.PrimFunc, target: Target, space: SearchSpace) -> tirx.PrimFunc | Refusal:
    """Schedule any kernel.

    Elementwise blocks are inlined; outer loops run in parallel, the innermost one in vectors. A
    block that cannot be transformed is left unchanged.
    """
    del space  # The rule makes no decisions.
    sch = s_tir.Schedule(func)
    root = sch.get_sblock("root")

    # Step 1. Inline elementwise blocks.
    for block in sch.get_child_blocks(root):
        with contextlib.suppress(ScheduleError):
            _inline(sch, block)

    # Step 2. Parallelize and vectorize each remaining block.
    for block in sch.get_child_blocks(root):
        with contextlib.suppress(ScheduleError):
            _parallelize(sch, block, vector_unit(target))
    return sch.mod["main"]


def _inline(sch: s_tir.Schedule, block: SBlockRV) -> None:
    """Inline an elementwise block into its only consumer, unless that is a reduction."""
    consumers = sch.get_consumers(block)
    if len(consumers) == 1 and not reduces(sch, block) and not reduces(sch, consumers[0]):
        sch.compute_inline(block)


def _parallelize(sch: s_tir.Schedule, block: SBlockRV, unit: VectorUnit) -> None:
    """Parallelize and vectorize a block whose axes are plain loops."""
    axes = plain_axes(sch, block)
    if axes is None:
        return
    spatial, reduction = axes
    extents = [static(sch.get(loop).extent) for loop in spatial]
    steps = [static(sch.get(loop).extent) for loop in reduction]
    outer = spatial[:-1]
    lane: list[LoopRV] = []
    last = spatial[-1]
    width = vector_width(extents[-1], unit.lanes("float32"))
    if width > 1 and _stores_contiguously(sch, block, last):
        last, vector = sch.split(last, [None, width])
        lane = [vector]
    sch.reorder(*outer, last, *reduction, *lane)
    known = [size for size in extents[:-1] if size is not None]
    if not outer or (len(known) == len(outer) and math.prod(known) < _ENOUGH_TASKS):
        outer = [*outer, last]
    sizes = [*extents, *steps]
    if None in sizes or math.prod(size for size in sizes if size) >= _SERIAL_WORK:
        sch.parallel(sch.fuse(*outer))
    if lane:
        sch.vectorize(lane[0])
    if reduction:
        sch.decompose_reduction(block, reduction[0])


def _stores_contiguously(sch: s_tir.Schedule, block: SBlockRV, loop: LoopRV) -> bool:
    """Whether a loop iterates over the last dimension of what a block stores."""
    node = sch.get(block)
    realize = sch.get(sch.get_loops(block)[-1]).body
    axes = {
        axis.var
        for axis, value in zip(realize.block.iter_vars, realize.iter_values, strict=True)
        if value.same_as(sch.get(loop).loop_var)
    }
    return all(region.region[-1].min in axes for region in node.writes)
