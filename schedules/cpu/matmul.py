"""Matmuls with packed weights on CPUs: register tiles of rows x columns."""

from __future__ import annotations

from typing import Final

from tvm import s_tir, tirx
from tvm.target import Target

from dcnv3_tvm.dtypes import DTYPE_BYTES
from dcnv3_tvm.op.expr import constant_factor
from dcnv3_tvm.schedules.cpu.dot_product import sum_pairs
from dcnv3_tvm.schedules.cpu.loops import accumulate_tile
from dcnv3_tvm.schedules.cpu.neon import fits_lanes, sum_by_lane
from dcnv3_tvm.schedules.cpu.register_tiles import (
    SPILLED_STEPS,
    largest_divisor,
    matmul_blocks,
    numbered,
    row_tile,
    row_tiles,
    tile_columns,
    unrolled_depth,
    unspilled_rows,
    vector_unit,
    weights_stay_cached,
)
from dcnv3_tvm.schedules.cpu.weight_prefetch import WeightUse, prefetch_next_tile
from dcnv3_tvm.schedules.rule import Refusal, refuse_other_kernels
from dcnv3_tvm.schedules.space import SearchSpace

_ALL: Final = 0
"""Candidate of ``block`` for all row tiles: tasks iterate over rows first."""

_BLOCKS: Final = (1, 2, 4, 8, 16, _ALL)
"""Candidates for the row tiles of a cache block."""

_BLOCK_BYTES: Final = 768 * 1024
"""Most bytes of x in a cache block, which stay in the L2 cache."""

_FEWEST: Final = 4
"""Row tiles of a cache block, at least, so that weights are not read from memory too often."""

_OPERATIONS: Final = 32
"""Vector operations in an iteration over K that prefetches, about, so that they take longer."""

_FEW_ROWS: Final = 1024
"""Most rows for which reading the weights from memory takes a large part of the time. Of a dynamic
number only the constant factor counts, the rows of an image."""


def matmul(func: tirx.PrimFunc, target: Target, space: SearchSpace) -> tirx.PrimFunc | Refusal:
    """Schedule matmuls with packed weights.

    A task is a register tile of sums, which stay in registers over the whole of K. A block of row
    tiles stays in the L2 cache while tasks iterate over the weights, and half of the rows at most
    so that a core reads what it wrote in the kernel before. Of many rows, whose weights fit that
    cache, a block is one tile. While rows are few, tasks prefetch the weights.
    """
    if refusal := refuse_other_kernels(func, "matmul"):
        return refusal
    weight = func.params[1]
    dtype = str(weight.dtype)
    unit = vector_unit(target)
    inputs = int(func.params[0].shape[-1])
    row_bytes = inputs * DTYPE_BYTES[dtype]
    sch = s_tir.Schedule(func)
    for index, (sums, epilogue) in enumerate(matmul_blocks(sch)):
        # Step 1. Choose the register tile and the block of row tiles.
        row, column = sch.get_loops(epilogue)
        columns = tile_columns(sch, column, weight)
        extent = sch.get(row).extent
        rows = row_tile(extent, columns, unit, dtype, row_bytes)
        rows = space.pick(numbered("rows", index), row_tiles(extent), rows)
        known = constant_factor(extent)
        few = known <= _FEW_ROWS and not unit.by_lane
        usual = 1 if weights_stay_cached(weight) else _ALL
        if few or usual == _ALL:
            usual = _block(known // rows, rows * row_bytes, usual)
        block = space.pick(numbered("block", index), _BLOCKS, usual)

        # Step 2. Tile the output and run tiles in parallel.
        row_outer, row_inner = sch.split(row, [None, rows])
        column_outer, column_inner = sch.split(column, [None, columns])
        tiles, count = sch.get(column_outer).extent, sch.get(row_outer).extent
        together = count if block == _ALL else largest_divisor(constant_factor(count), block)
        first, second = sch.split(row_outer, [1, None] if block == _ALL else [None, together])
        sch.reorder(first, column_outer, second, row_inner, column_inner)
        task = sch.fuse(first, column_outer, second)
        sch.parallel(task)

        # Step 3. Accumulate a tile in registers.
        sch.compute_at(sums, task, preserve_unit_loops=True)
        sch.set_scope(sums, 0, "local")
        if fits_lanes(unit, columns, inputs, dtype):
            sum_by_lane(sch, sums, task, [], dtype)
        elif dtype == "bfloat16" and not unit.by_lane:
            depth = sum_pairs(sch, sums, task)
        else:
            *_, tile_row, tile_column, depth = sch.get_loops(sums)
            most = 1
            if rows > unspilled_rows(columns, unit, dtype):
                most = SPILLED_STEPS
            elif few and known > rows:
                most = max(1, _OPERATIONS // (rows * -(-columns // unit.lanes(dtype))))
            depth, tile_depth = unrolled_depth(sch, depth, space, index, most=most)
            sch.reorder(depth, tile_depth, tile_row, tile_column)
            accumulate_tile(sch, sums, [tile_depth, tile_row, tile_column], depth)

        # Step 4. Prefetch the next weight tile; but the last one has none, and neither have the
        # narrower columns. Of an unknown number of rows, only tasks of one tile in turn prefetch.
        if few and index == 0 and (known >= rows or block == _ALL):
            number = sch.get(task).loop_var
            column_tile = tirx.floormod(tirx.floordiv(number, together), tiles)
            use = WeightUse(column_tile, tirx.floormod(number, together), together)
            prefetch_next_tile(sch, weight, use, [depth])

        # Step 5. Apply the epilogue to the tile.
        sch.unroll(row_inner)
        sch.vectorize(column_inner)
    return sch.mod["main"]


def _block(count: int, tile_bytes: int, otherwise: int) -> int:
    """Return the row tiles of a cache block, of `count` tiles that read `tile_bytes` of x each.

    Where the number is unknown (0) or does not divide well, return `otherwise`.
    """
    most = max(1, min(count // 2, _BLOCK_BYTES // tile_bytes))
    together = largest_divisor(count, most)
    return together if together >= _FEWEST and 2 * together >= most else otherwise
