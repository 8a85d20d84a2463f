"""Schedule of every kernel that no other rule knows: stock operators after legalisation."""

from __future__ import annotations

import contextlib
import math
from typing import Final

from tvm import s_tir, tirx
from tvm.s_tir.schedule import LoopRV, SBlockRV, ScheduleError
from tvm.target import Target

from dcnv3_tvm.op.expr import static
from dcnv3_tvm.schedules.blocks import plain_axes, reduces
from dcnv3_tvm.schedules.cpu.register_tiles import VectorUnit, vector_unit, vector_width
from dcnv3_tvm.schedules.rule import Refusal
from dcnv3_tvm.schedules.space import SearchSpace

SERIAL_WORK: Final = 65536
"""Elements below which a loop is done before the other threads have woken up."""

ENOUGH_TASKS: Final = 16
"""Tasks that share out well enough that the loop inside them need not be shared out too."""


def fallback(func: tirx.PrimFunc, target: Target, space: SearchSpace) -> tirx.PrimFunc | Refusal:
    """Inline what is elementwise, run outer loops in parallel and the innermost one in vectors.

    A block that resists is left as it is.
    """
    del space  # There is nothing to decide.
    sch = s_tir.Schedule(func)
    root = sch.get_sblock("root")
    for block in sch.get_child_blocks(root):
        with contextlib.suppress(ScheduleError):
            _inline(sch, block)
    for block in sch.get_child_blocks(root):
        with contextlib.suppress(ScheduleError):
            _spread(sch, block, vector_unit(target))
    return sch.mod["main"]


def _inline(sch: s_tir.Schedule, block: SBlockRV) -> None:
    """Inline a block that no consumer then computes more often."""
    consumers = sch.get_consumers(block)
    if len(consumers) == 1 and not reduces(sch, block) and not reduces(sch, consumers[0]):
        sch.compute_inline(block)


def _spread(sch: s_tir.Schedule, block: SBlockRV, unit: VectorUnit) -> None:
    """Share out the loops of a block among threads and lanes, if they are plain loops."""
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
    if width > 1 and _stores_along(sch, block, last):
        last, vector = sch.split(last, [None, width])
        lane = [vector]
    sch.reorder(*outer, last, *reduction, *lane)
    known = [size for size in extents[:-1] if size is not None]
    if not outer or (len(known) == len(outer) and math.prod(known) < ENOUGH_TASKS):
        outer = [*outer, last]
    sizes = [*extents, *steps]
    if None in sizes or math.prod(size for size in sizes if size) >= SERIAL_WORK:
        sch.parallel(sch.fuse(*outer))
    if lane:
        sch.vectorize(lane[0])
    if reduction:
        sch.decompose_reduction(block, reduction[0])


def _stores_along(sch: s_tir.Schedule, block: SBlockRV, loop: LoopRV) -> bool:
    """Whether neighbouring values of a loop store to neighbouring elements."""
    node = sch.get(block)
    realize = sch.get(sch.get_loops(block)[-1]).body
    axes = {
        axis.var
        for axis, value in zip(realize.block.iter_vars, realize.iter_values, strict=True)
        if value.same_as(sch.get(loop).loop_var)
    }
    return all(region.region[-1].min in axes for region in node.writes)
