"""GEMM on tensor cores: software-pipelined tiles in shared memory, fragments in registers."""

from __future__ import annotations

import dataclasses
from typing import Final

from tvm import s_tir
from tvm.target import Target

from dcnv3_tvm.gpu import FRAGMENT, FULL_GPU_BLOCKS
from dcnv3_tvm.op.expr import static
from dcnv3_tvm.schedules.gpu.loops import divisors
from dcnv3_tvm.schedules.gpu.tiles import (
    PAD_BYTES,
    copy_tile,
    copy_vector,
    load_fragments,
    multiply_fragments,
    store_fragments,
    store_tile,
)
from dcnv3_tvm.schedules.space import DecisionError, SearchSpace
from dcnv3_tvm.targets import gpu_architecture

_TILE: Final = 128
"""Most rows and columns of a tile."""

_WIDE_TILE: Final = 160
"""Most columns of a tile if no divisor of the columns up to `_TILE` is large enough."""

_STAGES: Final = 3
"""Steps in shared memory: one is multiplied while the others are copied."""

_STEPS: Final = (4, 2)
"""Fragments of a step along the depth, best first. With four, a row in shared memory spans all
banks, and eight threads copy it without bank conflicts."""


@dataclasses.dataclass(frozen=True)
class Tile:
    """Tile of a thread block, in fragments of 16.

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
        """Bytes of shared memory of a block: those of the operands, later reused for the sums."""
        high = self.warp_rows * self.rows * FRAGMENT
        wide = self.warp_columns * self.columns * FRAGMENT
        step = (high + wide) * (2 * self.depth * FRAGMENT + PAD_BYTES)
        return max(self.stages * step, high * (wide + 8) * 4)


def schedule_on_tensor_cores(sch: s_tir.Schedule, target: Target, space: SearchSpace) -> None:
    """Schedule a GEMM whose operands are float16 or bfloat16; sums are float32."""
    operand, matmul = sch.get_sblock("operand"), sch.get_sblock("sums")
    epilogue = sch.get_sblock("epilogue")
    row, column, depth = sch.get_loops(matmul)
    dtype = str(sch.get(operand).writes[0].source.dtype)

    # Step 1. Choose the tile.
    extents = [static(sch.get(loop).extent) for loop in (row, column, depth)]
    wide, deep = extents[1] or FRAGMENT, extents[2] or FRAGMENT
    shared_bytes = gpu_architecture(target).block_shared_bytes
    default = default_tile(extents[0], wide, deep, shared_bytes)
    if copy_vector(sch, operand) == 1 and default.rows % 2 == 0:
        # Elements that are copied one by one need as many addresses in registers.
        default = dataclasses.replace(default, rows=default.rows // 2)
    tile = _pick_tile(space, default, wide // FRAGMENT, deep // FRAGMENT)
    if tile != default and tile.shared_bytes > shared_bytes:
        raise DecisionError(
            "a block has too much shared memory",
            got=f"{tile.shared_bytes} bytes",
            allowed=f"up to {shared_bytes}",
        )

    # Step 2. Tile the loops by blocks, warps, steps and fragments.
    row, warp_row, rows, i = sch.split(row, [None, tile.warp_rows, tile.rows, FRAGMENT])
    column, warp_column, columns, j = sch.split(
        column, [None, tile.warp_columns, tile.columns, FRAGMENT]
    )
    step, depth, k = sch.split(depth, [None, tile.depth, FRAGMENT])
    sch.reorder(row, column, warp_row, warp_column, step, depth, rows, columns, i, j, k)
    block, warp = sch.fuse(row, column), sch.fuse(warp_row, warp_column)
    sch.bind(block, "blockIdx.x")
    sch.bind(warp, "threadIdx.y")
    warps = tile.warp_rows * tile.warp_columns

    # Step 3. Accumulate in registers, and pass the sums to the epilogue through shared memory.
    sums = sch.cache_write(matmul, 0, "warp")
    sch.reverse_compute_at(sums, warp, preserve_unit_loops=True)
    sch.reverse_compute_at(epilogue, block, preserve_unit_loops=True)
    sch.set_scope(sums, 0, "shared.dyn")

    # Step 4. Copy the operands to shared memory at each step, then to fragments.
    weight = sch.cache_read(matmul, 1, "shared.dyn")
    first, second = sch.cache_read(matmul, 0, "warp"), sch.cache_read(matmul, 1, "warp")
    for fragment in (first, second):
        sch.compute_at(fragment, depth, preserve_unit_loops=True)
    sch.set_scope(operand, 0, "shared.dyn")
    for copy in (operand, weight):
        copy_tile(sch, copy, step, warps)

    # Step 5. Apply the epilogue and store in vectors.
    store_tile(sch, epilogue, block, warps)

    # Step 6. Load, multiply and store fragments by tensor intrinsics.
    load_fragments(sch, first, dtype, second=False)
    load_fragments(sch, second, dtype, second=True)
    store_fragments(sch, sums)
    multiply_fragments(sch, [depth, rows, columns], i, step, dtype)

    # Step 7. Pipeline: copy later steps asynchronously while this one is multiplied.
    if tile.stages > 1:
        sch.annotate(step, "software_pipeline_stage", [0, 0, tile.stages - 1])
        sch.annotate(step, "software_pipeline_order", [0, 1, 2])
        sch.annotate(step, "software_pipeline_async_stages", [0])


def default_tile(rows: int | None, columns: int, depth: int, shared_bytes: int) -> Tile:
    """Choose a tile.

    Parameters
    ----------
    rows, columns, depth : int
        Padded extents; None for a dynamic number of rows.
    shared_bytes : int
        Most bytes of shared memory of a block.
    """
    wide = max(divisors(columns // FRAGMENT, _TILE // FRAGMENT))
    if wide * FRAGMENT < _TILE // 2:
        wide = max(divisors(columns // FRAGMENT, _WIDE_TILE // FRAGMENT))
    high = max(_powers(_TILE // FRAGMENT, (rows or _TILE) // FRAGMENT))
    # Fewer tiles than multiprocessors: halve the tile, the longer side first.
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
    # More than one step, so that copies can be asynchronous.
    fitting = (step for step in _STEPS if depth % (step * FRAGMENT) == 0 < depth - step * FRAGMENT)
    step = next(fitting, depth // FRAGMENT)
    tile = Tile(warp_rows, warp_columns, high // warp_rows, wide // warp_columns, step, stages=1)
    # At least two resident blocks; if they do not fit, at least two stages.
    for stages, most in ((_STAGES, shared_bytes // 2), (2, shared_bytes)):
        staged = dataclasses.replace(tile, stages=stages)
        if depth // FRAGMENT > step and staged.shared_bytes <= most:
            return staged
    return tile


def _pick_tile(space: SearchSpace, default: Tile, columns: int, depth: int) -> Tile:
    """Decide a tile of a matrix with `columns` and `depth` fragments."""

    def pick(name: str, most: int, total: int = 0) -> int:
        value: int = getattr(default, name)
        return space.pick(name, _powers(most, total), value)

    step = pick("depth", 4, depth)
    return Tile(
        warp_rows=pick("warp_rows", 4),
        warp_columns=pick("warp_columns", 4, columns),
        rows=pick("rows", 4),
        columns=pick("columns", 8, columns),
        depth=step,
        # Not more stages than steps.
        stages=min(space.pick("stages", (2, 3, 4), default.stages), depth // step),
    )


def _powers(most: int, total: int) -> list[int]:
    """Return the powers of two up to `most` that divide `total`; all of them divide 0."""
    powers = [1 << power for power in range(most.bit_length())]
    return [number for number in powers if total % number == 0]


def _tiles(rows: int, columns: int, high: int, wide: int) -> int:
    return (rows // (high * FRAGMENT)) * (columns // (wide * FRAGMENT))


def _warps(high: int, wide: int) -> tuple[int, int]:
    """Split a tile among up to four warps, each with a part as square as possible."""
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
