"""Scheduling steps on loops that the GPU rules share."""

from __future__ import annotations

from collections.abc import Sequence

from tvm import s_tir
from tvm.s_tir.schedule import LoopRV, SBlockRV

from dcnv3_tvm.gpu import vector_elements
from dcnv3_tvm.op.expr import static


def divisors(number: int, largest: int | None = None) -> list[int]:
    """List the divisors of a number, up to `largest`."""
    limit = number if largest is None else min(number, largest)
    return [d for d in range(1, limit + 1) if number % d == 0]


def bind_blocks(sch: s_tir.Schedule, outer: Sequence[LoopRV], inner: Sequence[LoopRV]) -> None:
    """Bind consecutive loops to thread blocks.

    One grid axis is enough if at most the first extent is dynamic, because block indices are not
    divided by it. Otherwise the inner loops get an axis of their own (CUDA allows 65535 blocks on
    it), which saves divisions by dynamic extents.
    """
    known = all(static(sch.get(loop).extent) is not None for loop in (*outer[1:], *inner))
    axes = [[*outer, *inner]] if known else [outer, inner]
    for loops, axis in zip(axes, ("blockIdx.x", "blockIdx.y"), strict=False):
        sch.bind(sch.fuse(*loops), axis)


def unroll_all(sch: s_tir.Schedule, loops: Sequence[LoopRV]) -> None:
    """Unroll loops."""
    for loop in loops:
        sch.unroll(loop)


def vectorize_copy(sch: s_tir.Schedule, copy: SBlockRV, extent: int) -> None:
    """Split the innermost loop of a copy into unrolled vectors, as wide as divide `extent`."""
    width = vector_elements(extent, str(sch.get(copy).writes[0].source.dtype))
    outer, lane = sch.split(sch.get_loops(copy)[-1], [None, width])
    sch.unroll(outer)
    sch.vectorize(lane)
