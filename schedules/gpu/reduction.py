"""Reductions on GPUs: sums, means, softmax, small matmuls."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from typing import Any, Final

from tvm import s_tir, tirx
from tvm.s_tir.schedule import LoopRV, SBlockRV, ScheduleError
from tvm.sym import Analyzer

from dcnv3_tvm.gpu import BANDWIDTH_THREADS, WARP_SIZE
from dcnv3_tvm.op.expr import product, static
from dcnv3_tvm.schedules.blocks import plain_axes
from dcnv3_tvm.schedules.gpu.elementwise import bind_elements

_SHORT: Final = 16
"""Most steps that one thread reduces alone."""

_ROWS: Final = 4
"""Warps of a block, where each warp reduces a row."""

_LONG: Final = 1024
"""Most elements of a row that one warp reduces."""

_THREADS: Final = 256
"""Threads that reduce a longer row."""

_SHARES: Final = 8
"""Threads that share a reduction whose neighbours read contiguous elements."""


def reduction(sch: s_tir.Schedule, blocks: list[SBlockRV], result: SBlockRV) -> bool:
    """Compute reductions in the GPU kernel of the elementwise block that reads them.

    Parameters
    ----------
    sch : Schedule
        Schedule to change.
    blocks : list of SBlockRV
        Reductions of plain loops, producers first.
    result : SBlockRV
        Last block, of plain loops. The axes that no reduction depends on form a row, as in a
        softmax; the others are its positions.

    Returns
    -------
    bool
        False if a position needs more than one value of a reduction, or a reduction cannot be
        split; the schedule is unchanged then.
    """
    # Step 1. Split the axes of the result into positions and a row.
    spatial, _ = plain_axes(sch, result) or ([], [])
    depends = _axes_read(sch, blocks, result)
    places = [loop for axis, loop in enumerate(spatial) if axis in depends]
    row = [loop for axis, loop in enumerate(spatial) if axis not in depends]
    if not all(
        _is_splittable(sch, block) and _is_scalar_at(sch, block, places) for block in blocks
    ):
        return False

    # Step 2. Choose the threads of a position: one, some of a block, a warp, or a block.
    outputs = _extent(sch, places, 1)
    steps = max(_extent(sch, _reduction_loops(sch, block), _LONG) for block in blocks)
    # TVM cannot bound the results of a block in a dynamic number of rows shorter than a warp.
    bounded = _extent(sch, places, 0) > 0 or _extent(sch, places[-1:], WARP_SIZE) >= WARP_SIZE
    sch.reorder(*places, *row)
    place = sch.fuse(*places) if places else sch.add_unit_loop(row[0])
    if not row and (outputs >= BANDWIDTH_THREADS or steps <= _SHORT):
        threads = _Threads(bind_elements(sch, place))
    elif bounded and not row and len(blocks) == 1 and _reads_contiguously(sch, blocks[0]):
        threads = _Threads(_bind(sch, place, WARP_SIZE, "threadIdx.x"), "threadIdx.y", _SHARES)
    elif max(steps, _extent(sch, row, _LONG)) <= _LONG:
        threads = _Threads(_bind(sch, place, _ROWS, "threadIdx.y"), "threadIdx.x", WARP_SIZE)
    else:
        threads = _Threads(_bind(sch, place, 1, "threadIdx.y"), "threadIdx.x", _THREADS)

    # Step 3. Reduce at each position, then compute the row.
    for block in reversed(blocks):
        threads.reduce(sch, block)
    if row:
        threads.bind(sch, sch.fuse(*row))
    return True


@dataclasses.dataclass(frozen=True)
class _Threads:
    """Threads that reduce at one position.

    Parameters
    ----------
    at : LoopRV
        Loop over positions, bound so that a thread has one.
    axis : str or None
        Thread axis that shares the position; None for a single thread.
    count : int
        Number of threads.
    """

    at: LoopRV
    axis: str | None = None
    count: int = 1

    def reduce(self, sch: s_tir.Schedule, block: SBlockRV) -> None:
        """Reduce a block at the position."""
        sch.compute_at(block, self.at, preserve_unit_loops=True)
        # Shuffles leave the result in a register of every thread of a warp.
        warp = self.axis is None or (self.axis == "threadIdx.x" and self.count <= WARP_SIZE)
        sch.set_scope(block, 0, "local" if warp else "shared")
        steps = _reduction_loops(sch, block)
        if self.axis is None:
            # Where this fails, the first step is detected at run time.
            # See tvm_workarounds: dynamic-extents.
            with contextlib.suppress(ScheduleError):
                sch.decompose_reduction(block, steps[0])
        else:
            self.bind(sch, sch.fuse(*steps))

    def bind(self, sch: s_tir.Schedule, loop: LoopRV) -> None:
        """Split a loop over the threads of the position."""
        step, thread = sch.split(loop, [None, self.count])
        sch.reorder(thread, step)
        sch.bind(thread, self.axis)


def _bind(sch: s_tir.Schedule, place: LoopRV, count: int, axis: str) -> LoopRV:
    """Bind `count` positions to each thread block, and return the thread loop."""
    block, inner = sch.split(place, [None, count])
    sch.bind(block, "blockIdx.x")
    sch.bind(inner, axis)
    return inner


def _axes_read(sch: s_tir.Schedule, blocks: list[SBlockRV], result: SBlockRV) -> set[int]:
    """Return the axes of the last block that index the reductions it reads."""
    reduced = [sch.get(block).writes[0].source for block in blocks]
    node = sch.get(result)
    used: list[Any] = []
    for region in node.reads:
        if any(region.source.same_as(source) for source in reduced):
            for dimension in region.region:
                used += tirx.analysis.undefined_vars(dimension.min)
    return {
        index
        for index, axis in enumerate(node.iter_vars)
        if any(axis.var.same_as(var) for var in used)
    }


def _is_splittable(sch: s_tir.Schedule, block: SBlockRV) -> bool:
    """Whether threads can share a reduction: it has one result and starts from a constant."""
    init = sch.get(block).init
    return isinstance(init, tirx.BufferStore) and isinstance(
        init.value, (tirx.FloatImm, tirx.IntImm)
    )


def _is_scalar_at(sch: s_tir.Schedule, block: SBlockRV, places: list[LoopRV]) -> bool:
    """Whether a reduction has exactly one value at each position."""
    spatial, _ = plain_axes(sch, block) or ([], [])
    values, wanted = (
        product([sch.get(loop).extent for loop in loops]) for loops in (spatial, places)
    )
    return bool(Analyzer().can_prove_equal(values, wanted))


def _reduction_loops(sch: s_tir.Schedule, block: SBlockRV) -> list[LoopRV]:
    """Return the reduction loops of a block, which are its innermost ones."""
    kinds = [axis.iter_type for axis in sch.get(block).iter_vars]
    count = kinds.count(tirx.IterVar.CommReduce)
    return list(sch.get_loops(block)[-count:])


def _reads_contiguously(sch: s_tir.Schedule, block: SBlockRV) -> bool:
    """Whether neighbouring results of a reduction read neighbouring elements."""
    node = sch.get(block)
    spatial = [axis for axis in node.iter_vars if axis.iter_type == tirx.IterVar.DataPar]
    return any(spatial[-1].var.same_as(region.region[-1].min) for region in node.reads)


def _extent(sch: s_tir.Schedule, loops: list[LoopRV], dynamic: int) -> int:
    """Return the product of extents, with `dynamic` for each dynamic one."""
    return math.prod(static(sch.get(loop).extent) or dynamic for loop in loops)
