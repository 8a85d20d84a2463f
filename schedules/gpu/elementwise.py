"""Kernels on GPUs that compute each element on its own, among them transposes."""

from __future__ import annotations

import math
from typing import Any, Final

from tvm import s_tir
from tvm.s_tir.schedule import LoopRV, SBlockRV
from tvm.sym import Analyzer

from dcnv3_tvm.dtypes import DTYPE_BYTES
from dcnv3_tvm.gpu import BANDWIDTH_THREADS, vector_elements
from dcnv3_tvm.op.expr import static
from dcnv3_tvm.schedules.blocks import plain_axes
from dcnv3_tvm.schedules.gpu.loops import vectorize_copy

_THREADS: Final = 256
"""Threads of a block."""

_FEWEST_THREADS: Final = 64
"""Threads of a block, where there is less to do."""

_TILE: Final = 32
"""Most rows and columns of a tile that is turned over."""

_NARROW: Final = 4
"""Neighbouring elements that are too few to be worth a tile."""


def bind_elements(sch: s_tir.Schedule, element: LoopRV) -> LoopRV:
    """Give each thread one iteration of a loop, and return the loop of the threads."""
    block, thread = sch.split(element, [None, _THREADS])
    sch.bind(block, "blockIdx.x")
    sch.bind(thread, "threadIdx.x")
    return thread


def elementwise(sch: s_tir.Schedule, block: SBlockRV) -> None:
    """Schedule a block of plain spatial loops.

    A thread takes neighbouring elements, in vectors where neighbours are read or written. Where a
    tensor is read along another axis than the result's last one, a tile of it is turned over in
    shared memory, so that both are accessed along their last axes.
    """
    node = sch.get(block)
    loops, _ = plain_axes(sch, block) or ([], [])
    axes = [axis.var for axis in node.iter_vars]
    along = _position(node.writes[0].region[-1].min, axes) if node.writes[0].region else None
    if along is None or len(node.writes) > 1:
        bind_elements(sch, sch.fuse(*loops))
        return
    for index, region in enumerate(node.reads):
        across = _turned(sch, region, axes, loops, along)
        if across is not None:
            _turn(sch, block, index, loops, across, along)
            return
    _move_vectors(sch, block, loops, axes, along)


def _position(index: Any, axes: list[Any]) -> int | None:
    """Return which axis an index is, if it is one."""
    return next((i for i, axis in enumerate(axes) if axis.same_as(index)), None)


def _turned(
    sch: s_tir.Schedule, region: Any, axes: list[Any], loops: list[LoopRV], along: int
) -> int | None:
    """Return the axis along which a tensor lies, if it is to be turned to lie along another."""
    positions = [_position(dimension.min, axes) for dimension in region.region]
    across = positions[-1] if positions else None
    if across is None or None in positions or along not in positions or across == along:
        return None
    # TVM allocates no tile of axes whose sizes it does not know.
    sizes = [static(sch.get(loops[axis]).extent) or 0 for axis in (across, along)]
    return across if min(sizes) > _NARROW else None


def _turn(
    sch: s_tir.Schedule,
    block: SBlockRV,
    index: int,
    loops: list[LoopRV],
    across: int,
    along: int,
) -> None:
    """Read a tensor in tiles of the axes `across`, its last one, and `along`, the result's."""
    axes = [axis.var for axis in sch.get(block).iter_vars]
    region = sch.get(block).reads[index].region
    rows = next(i for i, part in enumerate(region) if _position(part.min, axes) == along)
    others = [loop for axis, loop in enumerate(loops) if axis not in (across, along)]
    sizes = [static(sch.get(loops[axis]).extent) or 0 for axis in (across, along)]
    sides = [min(_TILE, 2 ** (size - 1).bit_length()) for size in sizes]
    parts = [
        sch.split(loops[axis], [None, side])
        for axis, side in zip((across, along), sides, strict=True)
    ]
    outer, inner = zip(*parts, strict=True)
    sch.reorder(*others, *outer, *inner)
    # Not fused, which spares divisions.
    rest = sch.fuse(*others) if others else sch.add_unit_loop(outer[0])
    for loop, name in zip((rest, *outer), ("blockIdx.x", "blockIdx.z", "blockIdx.y"), strict=True):
        sch.bind(loop, name)
    threads = min(_THREADS, max(_FEWEST_THREADS, math.prod(sides)))
    copy = sch.cache_read(block, index, "shared")
    sch.compute_at(copy, outer[-1], preserve_unit_loops=True)
    # An odd number of elements from row to row, so that a column lies in different banks.
    sch.storage_align(copy, 0, rows, _TILE, 1)
    for tile in (sch.get_loops(copy)[3:], inner):
        _, thread = sch.split(sch.fuse(*tile), [None, threads])
        sch.bind(thread, "threadIdx.x")


def _move_vectors(
    sch: s_tir.Schedule, block: SBlockRV, loops: list[LoopRV], axes: list[Any], along: int
) -> None:
    """Compute some neighbouring elements a thread, loaded and stored at once."""
    extents = [sch.get(loop).extent for loop in loops]
    node = sch.get(block)
    moved = [i for i, region in enumerate(node.reads) if _lies_along(region, axes, extents, along)]
    tensors = [node.writes[0].source, *(node.reads[i].source for i in moved)]
    last = static(extents[along]) or 1
    vector = vector_elements(last, *(str(tensor.dtype) for tensor in tensors))
    known = [static(extent) for extent in extents]
    elements = math.prod(size for size in known if size is not None)
    others = [loop for axis, loop in enumerate(loops) if axis != along]
    few = None not in known and elements < vector * BANDWIDTH_THREADS
    # Behind an axis of any length TVM does not always see how few elements a thread has.
    if vector == 1 or few or None in known[1:]:
        bind_elements(sch, sch.fuse(*others, loops[along]))
        return
    run, lane = sch.split(loops[along], [None, vector])
    sch.reorder(*others, run, lane)
    thread = bind_elements(sch, sch.fuse(*others, run))
    sch.unroll(lane)
    copies = [sch.cache_write(block, 0, "local")]
    sch.reverse_compute_at(copies[0], thread, preserve_unit_loops=True)
    for index in moved:
        copies.append(sch.cache_read(block, index, "local"))
        sch.compute_at(copies[-1], thread, preserve_unit_loops=True)
    for copy in copies:
        vectorize_copy(sch, copy, vector)


def _lies_along(region: Any, axes: list[Any], extents: list[Any], along: int) -> bool:
    """Whether a tensor is read as a whole, and its last axis is the axis `along`."""
    positions = [_position(dimension.min, axes) for dimension in region.region]
    analyzer = Analyzer()
    return (
        bool(positions)
        and positions[-1] == along
        and positions.count(along) == 1
        and str(region.source.dtype) in DTYPE_BYTES
        and all(
            position is not None and analyzer.can_prove_equal(size, extents[position])
            for position, size in zip(positions, region.source.shape, strict=True)
        )
    )
