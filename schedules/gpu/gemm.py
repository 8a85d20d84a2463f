"""Matrix products and convolutions on GPUs, in tiles: on tensor cores, or in float32 without."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Final

from tvm import s_tir, tirx
from tvm.target import Target

from dcnv3_tvm.dtypes import DTYPE_BYTES
from dcnv3_tvm.gpu import FRAGMENT, FULL_GPU_BLOCKS
from dcnv3_tvm.kernels.gemm import KERNEL
from dcnv3_tvm.op.expr import static
from dcnv3_tvm.schedules.gpu import tensor_core
from dcnv3_tvm.schedules.gpu.launch import set_min_blocks
from dcnv3_tvm.schedules.gpu.loops import (
    divisors,
    unroll_all,
    vectorize_copy,
)
from dcnv3_tvm.schedules.gpu.tensorize import annotate
from dcnv3_tvm.schedules.gpu.tiles import (
    PAD_BYTES,
    by_fragments,
    fetch,
    in_tiles,
    read_early,
    vector_of,
    write_vectors,
)
from dcnv3_tvm.schedules.rule import Refusal, refuse_other_kernels
from dcnv3_tvm.schedules.space import DecisionError, SearchSpace
from dcnv3_tvm.targets import gpu_architecture

_TILE: Final = 128
"""Most rows of a tile, and most of its columns but for those that divide badly."""

_WIDE_TILE: Final = 160
"""Most columns of a tile."""

_STAGES: Final = 3
"""Tiles of factors in shared memory: one is multiplied while the others arrive."""

_STEPS: Final = (4, 2)
"""Fragments of a step along the depth: with four, a row of a factor in shared memory lies in all
banks once, and eight threads that copy it in none twice."""

_THREADS: Final = 16
"""Rows and columns of threads of a block that multiplies without tensor cores."""

_MOST: Final = 8
"""Most rows, and most columns, of a thread."""

_PIECES: Final = (1, 2, 4, 8)
"""Rows, columns and vectors along the depth of a thread among which a tuner may choose."""

_QUAD: Final = 4
"""Elements of float32 in a vector."""


def gemm(func: tirx.PrimFunc, target: Target, space: SearchSpace) -> tirx.PrimFunc | Refusal:
    """Schedule the kernels of `dcnv3_tvm.kernels.gemm`.

    A block of threads computes a tile of the result. Step by step along the depth it copies the
    rows and weights it needs into shared memory, without a detour through registers where they
    need no conversion, while earlier steps are multiplied: on tensor cores in float16 and
    bfloat16, by threads in float32. The sums stay in registers to the end; those of tensor cores
    then pass through shared memory, so that the epilogue reads and writes whole vectors.

    Blocks that share rows follow each other, so that the rows come from the L2 cache.

    Parameters
    ----------
    func : tvm.tirx.PrimFunc
        Any unscheduled function.
    target : tvm.target.Target
        The target.
    space : SearchSpace
        What to decide otherwise than by default.

    Returns
    -------
    tvm.tirx.PrimFunc or Refusal
        The scheduled function; a refusal of other kernels.
    """
    if refusal := refuse_other_kernels(func, KERNEL):
        return refusal
    sch = s_tir.Schedule(func)
    if str(func.params[1].dtype) == "float32":
        _by_threads(sch, space)
    else:
        _on_tensor_cores(sch, func, target, space)
    return set_min_blocks(sch.mod["main"], target, space)


@dataclasses.dataclass(frozen=True)
class Tile:
    """How a result is cut into tiles, in fragments of 16.

    Parameters
    ----------
    warp_rows, warp_columns : int
        Warps of a block.
    rows, columns : int
        Fragments of a warp.
    depth : int
        Fragments of a step along the depth.
    stages : int
        Steps in shared memory at once.
    """

    warp_rows: int
    warp_columns: int
    rows: int
    columns: int
    depth: int
    stages: int

    @property
    def shared_bytes(self) -> int:
        """Shared memory of a block: the factors' steps, and after them the sums."""
        high = self.warp_rows * self.rows * FRAGMENT
        wide = self.warp_columns * self.columns * FRAGMENT
        step = (high + wide) * (2 * self.depth * FRAGMENT + PAD_BYTES)
        return max(self.stages * step, high * (wide + 8) * 4)


def default_tile(rows: int | None, columns: int, depth: int, shared_bytes: int) -> Tile:
    """Choose a tile.

    Parameters
    ----------
    rows, columns, depth : int
        Extents, filled up; rows are None where they are known only at run time.
    shared_bytes : int
        What a block can have.
    """
    wide = _largest(columns // FRAGMENT, _TILE // FRAGMENT)
    if wide * FRAGMENT < _TILE // 2:
        wide = _largest(columns // FRAGMENT, _WIDE_TILE // FRAGMENT)
    high = _largest((rows or _TILE) // FRAGMENT, _TILE // FRAGMENT, powers=True)
    # Fewer tiles than multiprocessors: smaller ones, first in the direction that is larger.
    while rows is not None and _tiles(rows, columns, high, wide) < FULL_GPU_BLOCKS:
        if high >= wide and high % 2 == 0:
            high //= 2
        elif wide % 2 == 0:
            wide //= 2
        elif high % 2 == 0:
            high //= 2
        else:
            break
    warp_rows, warp_columns = _warps(high, wide)
    # More than one, so that copies need not pass through registers.
    fitting = (step for step in _STEPS if depth % (step * FRAGMENT) == 0 < depth - step * FRAGMENT)
    step = next(fitting, depth // FRAGMENT)
    tile = Tile(warp_rows, warp_columns, high // warp_rows, wide // warp_columns, step, stages=1)
    # Two blocks at least should be there at once; where they cannot, two steps are better than one.
    for stages, most in ((_STAGES, shared_bytes // 2), (2, shared_bytes)):
        staged = dataclasses.replace(tile, stages=stages)
        if depth // FRAGMENT > step and staged.shared_bytes <= most:
            return staged
    return tile


def _picked(space: SearchSpace, tile: Tile, columns: int, depth: int) -> Tile:
    """Return what was chosen instead of a default tile, of `columns` and `depth` fragments."""

    def pick(name: str, most: int, total: int | None = None) -> int:
        default: int = getattr(tile, name)
        powers = [1 << power for power in range(most.bit_length())]
        fitting = [number for number in powers if total is None or total % number == 0]
        return space.pick(name, fitting, default)

    step = pick("depth", 4, depth)
    return Tile(
        warp_rows=pick("warp_rows", 4),
        warp_columns=pick("warp_columns", 4, columns),
        rows=pick("rows", 4),
        columns=pick("columns", 8, columns),
        depth=step,
        # One step needs no second place.
        stages=min(space.pick("stages", (2, 3, 4), tile.stages), depth // step),
    )


def _tiles(rows: int, columns: int, high: int, wide: int) -> int:
    return (rows // (high * FRAGMENT)) * (columns // (wide * FRAGMENT))


def _largest(number: int, limit: int, *, powers: bool = False) -> int:
    found = [d for d in divisors(number, limit) if not powers or d & (d - 1) == 0]
    return max(found)


def _warps(high: int, wide: int) -> tuple[int, int]:
    """Share a tile among up to four warps, so that each has a piece as square as can be."""
    rows = columns = 1
    while rows * columns < 4:
        if high // rows >= wide // columns and high % (2 * rows) == 0:
            rows *= 2
        elif wide % (2 * columns) == 0:
            columns *= 2
        elif high % (2 * rows) == 0:
            rows *= 2
        else:
            break
    return rows, columns


def _on_tensor_cores(
    sch: s_tir.Schedule, func: tirx.PrimFunc, target: Target, space: SearchSpace
) -> None:
    dtype = str(func.params[1].dtype)
    operand, product = sch.get_sblock("operand"), sch.get_sblock("sums")
    epilogue = sch.get_sblock("epilogue")
    row, column, depth = sch.get_loops(product)
    extents = [static(sch.get(loop).extent) for loop in (row, column, depth)]
    wide, deep = extents[1] or FRAGMENT, extents[2] or FRAGMENT
    shared_bytes = gpu_architecture(target).block_shared_bytes
    default = default_tile(extents[0], wide, deep, shared_bytes)
    if vector_of(sch, operand) == 1 and default.rows % 2 == 0:
        # What is copied one by one needs registers for as many places.
        default = dataclasses.replace(default, rows=default.rows // 2)
    tile = _picked(space, default, wide // FRAGMENT, deep // FRAGMENT)
    if tile != default and tile.shared_bytes > shared_bytes:
        raise DecisionError(
            "a block has too much shared memory",
            got=f"{tile.shared_bytes} bytes",
            allowed=f"up to {shared_bytes}",
        )
    warps = tile.warp_rows * tile.warp_columns
    row, warp_row, rows, i = sch.split(row, [None, tile.warp_rows, tile.rows, FRAGMENT])
    column, warp_column, columns, j = sch.split(
        column, [None, tile.warp_columns, tile.columns, FRAGMENT]
    )
    step, depth, k = sch.split(depth, [None, tile.depth, FRAGMENT])
    sch.reorder(row, column, warp_row, warp_column, step, depth, rows, columns, i, j, k)
    block, warp = sch.fuse(row, column), sch.fuse(warp_row, warp_column)
    sch.bind(block, "blockIdx.x")
    sch.bind(warp, "threadIdx.y")

    sums = sch.cache_write(product, 0, "warp")
    sch.reverse_compute_at(sums, warp, preserve_unit_loops=True)
    sch.reverse_compute_at(epilogue, block, preserve_unit_loops=True)
    sch.set_scope(sums, 0, "shared.dyn")
    weight = sch.cache_read(product, 1, "shared.dyn")
    first, second = sch.cache_read(product, 0, "warp"), sch.cache_read(product, 1, "warp")
    for fragment in (first, second):
        sch.compute_at(fragment, depth, preserve_unit_loops=True)
    # In shared memory before it is moved: so it is a tile of the block, not of a warp.
    sch.set_scope(operand, 0, "shared.dyn")
    for copy in (operand, weight):
        sch.compute_at(copy, step, preserve_unit_loops=True)
        fetch(sch, copy, warps, vector_of(sch, copy))
        sch.storage_align(copy, 0, axis=-2, factor=32, offset=PAD_BYTES // DTYPE_BYTES[dtype])
    write_vectors(sch, epilogue, block, warps)

    sch.transform_layout(first, ("write", 0), in_tiles(tensor_core.fragment))
    sch.transform_layout(second, ("write", 0), in_tiles(tensor_core.transposed_fragment))
    sch.transform_layout(sums, ("read", 0), in_tiles(tensor_core.fragment))
    by_fragments(sch, first, tensor_core.load(dtype, second=False))
    by_fragments(sch, second, tensor_core.load(dtype, second=True))
    stored = by_fragments(sch, sums, tensor_core.store())
    sch.storage_align(stored, 0, axis=-2, factor=32, offset=8)
    unroll_all(sch, [depth, rows, columns])
    multiply = sch.blockize(i)
    clear = sch.decompose_reduction(multiply, step)
    annotate(sch, multiply, tensor_core.multiply(dtype))
    annotate(sch, clear, tensor_core.clear())
    unroll_all(sch, sch.get_loops(clear)[-2:])
    if tile.stages > 1:
        # Copies of a later step, then the products of this one; the copies do not wait.
        sch.annotate(step, "software_pipeline_stage", [0, 0, tile.stages - 1])
        sch.annotate(step, "software_pipeline_order", [0, 1, 2])
        sch.annotate(step, "software_pipeline_async_stages", [0])


def _piece(rows: int | None, columns: int) -> tuple[int, int]:
    """Choose rows and columns of a thread: many, so that a factor is read for many products.

    But not so many that there are fewer blocks than multiprocessors.
    """
    heights = divisors((rows or _TILE) // _THREADS, _MOST)
    pieces = [(high, wide) for high in heights for wide in divisors(columns // _THREADS, _MOST)]
    enough = [
        piece
        for piece in pieces
        if rows is None or _tiles(rows, columns, *piece) >= FULL_GPU_BLOCKS
    ]
    return max(enough or [(1, 1)], key=lambda piece: (math.prod(piece), min(piece)))


def _by_vectors(depth: Any, column: Any) -> tuple[Any, ...]:
    """Return the place of a weight, of which a thread reads eight columns in two vectors."""
    return depth, column % (2 * _QUAD) // _QUAD, column // (2 * _QUAD), column % _QUAD


def _by_threads(sch: s_tir.Schedule, space: SearchSpace) -> None:
    """Give each of 16x16 threads a piece of up to 8x8 neighbouring sums."""
    operand, product = sch.get_sblock("operand"), sch.get_sblock("sums")
    epilogue = sch.get_sblock("epilogue")
    row, column, depth = sch.get_loops(product)
    extents = [static(sch.get(loop).extent) for loop in (row, column, depth)]
    high, wide = _piece(extents[0], extents[1] or _THREADS)
    steps = _largest((extents[2] or FRAGMENT) // _QUAD, 8)
    high = space.pick("rows", _PIECES, high)
    wide = space.pick("columns", _PIECES, wide)
    steps = space.pick("depth", _PIECES, steps)
    row, i, rows = sch.split(row, [None, _THREADS, high])
    column, j, columns = sch.split(column, [None, _THREADS, wide])
    step, depth, k = sch.split(depth, [None, steps, _QUAD])
    sch.reorder(row, column, i, j, step, depth, rows, columns, k)
    block, thread = sch.fuse(row, column), sch.fuse(i, j)
    sch.bind(block, "blockIdx.x")
    sch.bind(thread, "threadIdx.x")
    sch.set_scope(product, 0, "local")
    sch.set_scope(epilogue, 0, "local")
    sch.reverse_compute_at(epilogue, thread, preserve_unit_loops=True)
    store = sch.get_sblock("store")
    one_row = sch.get_loops(epilogue)[-2]
    sch.reverse_compute_at(store, one_row, preserve_unit_loops=True)
    unroll_all(sch, sch.get_loops(epilogue)[-2:])
    copies = [store]
    names = [read.source.name for read in sch.get(epilogue).reads]
    if "residual" in names:
        residual = read_early(sch, epilogue, names.index("residual"))
        sch.compute_at(residual, one_row, preserve_unit_loops=True)
        copies.append(residual)
    for copy in copies:
        whole = math.gcd(wide, int(sch.get(store).writes[0].source.shape[-1]))
        vectorize_copy(sch, copy, whole)
    weight = sch.cache_read(product, 1, "shared")
    first, second = sch.cache_read(product, 0, "local"), sch.cache_read(product, 1, "local")
    for vectors, width in ((first, _QUAD), (second, math.gcd(wide, _QUAD))):
        sch.compute_at(vectors, depth, preserve_unit_loops=True)
        sch.unroll(sch.get_loops(vectors)[-2])
        vectorize_copy(sch, vectors, width)
    # In shared memory before it is moved: so it is a tile of the block, not of a thread.
    sch.set_scope(operand, 0, "shared")
    for copy in (operand, weight):
        sch.compute_at(copy, step, preserve_unit_loops=True)
        high_loop, wide_loop = sch.get_loops(copy)[-2:]
        wide_loop, lane = sch.split(wide_loop, [None, vector_of(sch, copy)])
        turn, worker = sch.split(sch.fuse(high_loop, wide_loop), [None, _THREADS * _THREADS])
        sch.bind(worker, "threadIdx.x")
        sch.unroll(turn)
        sch.vectorize(lane)
    sch.storage_align(operand, 0, axis=-2, factor=32, offset=PAD_BYTES // 4)
    if wide == 2 * _QUAD:
        # The second vectors of all threads behind their first ones: neighbours in other banks.
        sch.transform_layout(weight, ("write", 0), _by_vectors)
    unroll_all(sch, [depth, rows, columns, k])
    clear = sch.decompose_reduction(product, step)
    unroll_all(sch, sch.get_loops(clear)[-2:])
