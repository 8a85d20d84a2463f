"""Elementwise kernels and transposes on GPUs: vector accesses, tiles in shared memory."""

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
"""Threads of a block that transposes a tile of fewer elements."""

_TILE: Final = 32
"""Most rows and columns of a transposed tile."""

_NARROW: Final = 4
"""Extent of an axis up to which reading it with a stride is faster than a tile."""


def bind_elements(sch: s_tir.Schedule, element: LoopRV) -> LoopRV:
    """Give each thread one iteration of a loop, and return the thread loop."""
    block, thread = sch.split(element, [None, _THREADS])
    sch.bind(block, "blockIdx.x")
    sch.bind(thread, "threadIdx.x")
    return thread


def elementwise(sch: s_tir.Schedule, block: SBlockRV) -> None:
    """Schedule a block of plain spatial loops.

    A thread computes neighbouring elements, in vectors where it reads or writes neighbours. A
    tensor whose contiguous axis is not the output's is transposed through shared memory, so that
    both accesses are coalesced.
    """
    node = sch.get(block)
    loops, _ = plain_axes(sch, block) or ([], [])
    axes = [axis.var for axis in node.iter_vars]

    # Step 1. Find the axis along which the output is contiguous.
    along = _position(node.writes[0].region[-1].min, axes) if node.writes[0].region else None
    if along is None or len(node.writes) > 1:
        bind_elements(sch, sch.fuse(*loops))
        return

    # Step 2. Transpose the first input that is contiguous along another axis.
    for index, region in enumerate(node.reads):
        across = _transposed_axis(sch, region, axes, loops, along)
        if across is not None:
            _transpose(sch, block, index, loops, across, along)
            return

    # Step 3. Otherwise vectorize.
    _vectorize(sch, block, loops, axes, along)


def _position(index: Any, axes: list[Any]) -> int | None:
    """Return the number of the axis that an index is, or None."""
    return next((i for i, axis in enumerate(axes) if axis.same_as(index)), None)


def _transposed_axis(
    sch: s_tir.Schedule, region: Any, axes: list[Any], loops: list[LoopRV], along: int
) -> int | None:
    """Return the contiguous axis of an input, if it is worth a tile in shared memory."""
    positions = [_position(dimension.min, axes) for dimension in region.region]
    across = positions[-1] if positions else None
    if across is None or None in positions or along not in positions or across == along:
        return None
    # No tile of dynamic extents. See tvm_workarounds: dynamic-extents.
    sizes = [static(sch.get(loops[axis]).extent) or 0 for axis in (across, along)]
    return across if min(sizes) > _NARROW else None


def _transpose(
    sch: s_tir.Schedule,
    block: SBlockRV,
    index: int,
    loops: list[LoopRV],
    across: int,
    along: int,
) -> None:
    """Read an input in tiles of its contiguous axis `across` and the output's, `along`."""
    axes = [axis.var for axis in sch.get(block).iter_vars]
    region = sch.get(block).reads[index].region
    rows = next(i for i, part in enumerate(region) if _position(part.min, axes) == along)

    # Step 1. Tile the two axes.
    others = [loop for axis, loop in enumerate(loops) if axis not in (across, along)]
    sizes = [static(sch.get(loops[axis]).extent) or 0 for axis in (across, along)]
    sides = [min(_TILE, 2 ** (size - 1).bit_length()) for size in sizes]
    parts = [
        sch.split(loops[axis], [None, side])
        for axis, side in zip((across, along), sides, strict=True)
    ]
    outer, inner = zip(*parts, strict=True)
    sch.reorder(*others, *outer, *inner)

    # Step 2. Bind tiles to blocks, one grid axis each: a fused axis would cost divisions.
    rest = sch.fuse(*others) if others else sch.add_unit_loop(outer[0])
    for loop, name in zip((rest, *outer), ("blockIdx.x", "blockIdx.z", "blockIdx.y"), strict=True):
        sch.bind(loop, name)

    # Step 3. Copy a tile to shared memory. An odd row stride avoids bank conflicts of columns.
    threads = min(_THREADS, max(_FEWEST_THREADS, math.prod(sides)))
    copy = sch.cache_read(block, index, "shared")
    sch.compute_at(copy, outer[-1], preserve_unit_loops=True)
    sch.storage_align(copy, 0, rows, _TILE, 1)

    # Step 4. Bind the copy and the computation to threads.
    for tile in (sch.get_loops(copy)[3:], inner):
        _, thread = sch.split(sch.fuse(*tile), [None, threads])
        sch.bind(thread, "threadIdx.x")


def _vectorize(
    sch: s_tir.Schedule, block: SBlockRV, loops: list[LoopRV], axes: list[Any], along: int
) -> None:
    """Give each thread a vector of neighbouring elements, loaded and stored at once."""
    extents = [sch.get(loop).extent for loop in loops]
    node = sch.get(block)

    # Step 1. Choose the vector by the smallest type among the output and the contiguous inputs.
    moved = [i for i, region in enumerate(node.reads) if _lies_along(region, axes, extents, along)]
    tensors = [node.writes[0].source, *(node.reads[i].source for i in moved)]
    last = static(extents[along]) or 1
    vector = vector_elements(last, *(str(tensor.dtype) for tensor in tensors))
    known = [static(extent) for extent in extents]
    elements = math.prod(size for size in known if size is not None)
    others = [loop for axis, loop in enumerate(loops) if axis != along]
    few = None not in known and elements < vector * BANDWIDTH_THREADS
    # No copy to registers with dynamic inner axes. See tvm_workarounds: dynamic-extents.
    if vector == 1 or few or None in known[1:]:
        bind_elements(sch, sch.fuse(*others, loops[along]))
        return

    # Step 2. Bind vectors to threads.
    run, lane = sch.split(loops[along], [None, vector])
    sch.reorder(*others, run, lane)
    thread = bind_elements(sch, sch.fuse(*others, run))
    sch.unroll(lane)

    # Step 3. Load and store through registers.
    copies = [sch.cache_write(block, 0, "local")]
    sch.reverse_compute_at(copies[0], thread, preserve_unit_loops=True)
    for index in moved:
        copies.append(sch.cache_read(block, index, "local"))
        sch.compute_at(copies[-1], thread, preserve_unit_loops=True)
    for copy in copies:
        vectorize_copy(sch, copy, vector)


def _lies_along(region: Any, axes: list[Any], extents: list[Any], along: int) -> bool:
    """Whether an input is read whole and its contiguous axis is `along`."""
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
