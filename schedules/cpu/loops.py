"""Scheduling steps on loops that the CPU rules share."""

from __future__ import annotations

import math
from collections.abc import Sequence

from tvm import s_tir
from tvm.s_tir.schedule import LoopRV, SBlockRV

from dcnv3_tvm.op.expr import static


def accumulate_tile(
    sch: s_tir.Schedule, sums: SBlockRV, tile: Sequence[LoopRV], reduction: LoopRV
) -> None:
    """Accumulate a tile in registers: rows unrolled, columns in vectors.

    Parameters
    ----------
    sch : Schedule
        Schedule to change.
    sums : SBlockRV
        Reduction block.
    tile : sequence of LoopRV
        Innermost loops of the block, the last one over columns.
    reduction : LoopRV
        Outermost reduction loop, around `tile`.
    """
    for loop in tile[:-1]:
        sch.unroll(loop)
    sch.vectorize(tile[-1])
    sch.decompose_reduction(sums, reduction)


def copy_in_task(sch: s_tir.Schedule, block: SBlockRV, task: LoopRV, lanes: int) -> None:
    """Compute the part of an elementwise block that a task reads, in the task."""
    sch.compute_at(block, task, preserve_unit_loops=True)
    vectorize_innermost(sch, block, lanes)


def copy_in_parallel(sch: s_tir.Schedule, block: SBlockRV, lanes: int) -> None:
    """Compute an elementwise block of at least two dimensions first, in parallel."""
    first, second, *_ = sch.get_loops(block)
    sch.parallel(sch.fuse(first, second))
    vectorize_innermost(sch, block, lanes)


def vector_width(extent: int | None, lanes: int) -> int:
    """Return the widest vector up to `lanes` that divides an extent; 1 if it is dynamic."""
    return 1 if extent is None else math.gcd(extent, 1 << (lanes.bit_length() - 1))


def vectorize_innermost(sch: s_tir.Schedule, block: SBlockRV, lanes: int) -> None:
    """Vectorize the innermost loop of a block by the widest vector that divides it."""
    loop = sch.get_loops(block)[-1]
    width = vector_width(static(sch.get(loop).extent), lanes)
    if width > 1:
        sch.vectorize(sch.split(loop, [None, width])[1])
