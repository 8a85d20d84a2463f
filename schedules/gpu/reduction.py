"""Kernels on GPUs that reduce: sums, means, softmax, small products."""

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
"""Steps that one thread takes before others could help it."""

_ROWS: Final = 4
"""Warps of a block, where a warp reduces a row."""

_LONG: Final = 1024
"""Elements of a row that are too many for one warp."""

_THREADS: Final = 256
"""Threads that share a row which is too long for one warp."""

_SHARES: Final = 8
"""Threads that share a result of which there are few, beside those of its neighbours."""


def reduction(sch: s_tir.Schedule, blocks: list[SBlockRV], result: SBlockRV) -> bool:
    """Bring reductions into the kernel of the elementwise block that reads them last.

    Parameters
    ----------
    sch : Schedule
        Schedule to change.
    blocks : list of SBlockRV
        The reductions, of plain loops, producers first.
    result : SBlockRV
        The last block, of plain loops. Axes on which no reduction depends are those of a row, as
        in a softmax.

    Returns
    -------
    bool
        False if the result needs more than one value of a reduction at a place, or threads cannot
        share one: nothing is changed then.
    """
    spatial, _ = plain_axes(sch, result) or ([], [])
    depends = _axes_read(sch, blocks, result)
    places = [loop for axis, loop in enumerate(spatial) if axis in depends]
    row = [loop for axis, loop in enumerate(spatial) if axis not in depends]
    if not all(_is_sum(sch, block) and _has_one_a_place(sch, block, places) for block in blocks):
        return False
    outputs = _product(sch, places, 1)
    steps = max(_product(sch, _steps(sch, block), _LONG) for block in blocks)
    sch.reorder(*places, *row)
    place = sch.fuse(*places) if places else sch.add_unit_loop(row[0])
    if not row and (outputs >= BANDWIDTH_THREADS or steps <= _SHORT):
        sharing = _Sharing(bind_elements(sch, place))
    elif not row and len(blocks) == 1 and _neighbours(sch, blocks[0]):
        sharing = _Sharing(_bind(sch, place, WARP_SIZE, "threadIdx.x"), "threadIdx.y", _SHARES)
    elif max(steps, _product(sch, row, _LONG)) <= _LONG:
        sharing = _Sharing(_bind(sch, place, _ROWS, "threadIdx.y"), "threadIdx.x", WARP_SIZE)
    else:
        sharing = _Sharing(_bind(sch, place, 1, "threadIdx.y"), "threadIdx.x", _THREADS)
    for block in reversed(blocks):
        sharing.reduce(sch, block)
    if row:
        sharing.bind(sch, sch.fuse(*row))
    return True


@dataclasses.dataclass(frozen=True)
class _Sharing:
    """Which threads reduce a row.

    Parameters
    ----------
    at : LoopRV
        Loop over rows, of which a thread sees one.
    thread : str or None
        Index of the threads that share the row; ``None`` where it has only one.
    count : int
        Their number.
    """

    at: LoopRV
    thread: str | None = None
    count: int = 1

    def reduce(self, sch: s_tir.Schedule, block: SBlockRV) -> None:
        """Compute a reduction where the row is."""
        sch.compute_at(block, self.at, preserve_unit_loops=True)
        # Shuffles bring the result to every thread of a warp.
        alone = self.thread is None or (self.thread == "threadIdx.x" and self.count <= WARP_SIZE)
        sch.set_scope(block, 0, "local" if alone else "shared")
        steps = _steps(sch, block)
        if self.thread is None:
            # Not where a symbolic size hides from TVM that the block is a plain sum: the first step
            # is then told from the others at run time.
            with contextlib.suppress(ScheduleError):
                sch.decompose_reduction(block, steps[0])
        else:
            self.bind(sch, sch.fuse(*steps))

    def bind(self, sch: s_tir.Schedule, loop: LoopRV) -> None:
        """Share out a loop within the row."""
        step, thread = sch.split(loop, [None, self.count])
        sch.reorder(thread, step)
        sch.bind(thread, self.thread)


def _bind(sch: s_tir.Schedule, place: LoopRV, count: int, thread: str) -> LoopRV:
    """Give `count` places to the threads of a block."""
    block, inner = sch.split(place, [None, count])
    sch.bind(block, "blockIdx.x")
    sch.bind(inner, thread)
    return inner


def _axes_read(sch: s_tir.Schedule, blocks: list[SBlockRV], result: SBlockRV) -> set[int]:
    """Return the axes of the last block on which the reductions that it reads depend."""
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


def _is_sum(sch: s_tir.Schedule, block: SBlockRV) -> bool:
    """Whether a reduction has one result and starts from a constant, so that it can be divided."""
    init = sch.get(block).init
    return isinstance(init, tirx.BufferStore) and isinstance(
        init.value, (tirx.FloatImm, tirx.IntImm)
    )


def _has_one_a_place(sch: s_tir.Schedule, block: SBlockRV, places: list[LoopRV]) -> bool:
    spatial, _ = plain_axes(sch, block) or ([], [])
    values, wanted = (
        product([sch.get(loop).extent for loop in loops]) for loops in (spatial, places)
    )
    return bool(Analyzer().can_prove_equal(values, wanted))


def _steps(sch: s_tir.Schedule, block: SBlockRV) -> list[LoopRV]:
    """Return the loops over what a block reduces, which are its innermost ones."""
    kinds = [axis.iter_type for axis in sch.get(block).iter_vars]
    count = kinds.count(tirx.IterVar.CommReduce)
    return list(sch.get_loops(block)[-count:])


def _neighbours(sch: s_tir.Schedule, block: SBlockRV) -> bool:
    """Whether neighbouring results of a reduction read neighbouring elements."""
    node = sch.get(block)
    spatial = [axis for axis in node.iter_vars if axis.iter_type == tirx.IterVar.DataPar]
    return any(spatial[-1].var.same_as(region.region[-1].min) for region in node.reads)


def _product(sch: s_tir.Schedule, loops: list[LoopRV], unknown: int) -> int:
    return math.prod(static(sch.get(loop).extent) or unknown for loop in loops)
