"""Matmuls with packed weights on CPUs: register tiles of rows x columns."""

from __future__ import annotations

from typing import Final

from tvm import s_tir, tirx
from tvm.target import Target

from dcnv3_tvm.dtypes import DTYPE_BYTES
from dcnv3_tvm.op.expr import static
from dcnv3_tvm.schedules.cpu.dot_product import sum_pairs
from dcnv3_tvm.schedules.cpu.loops import accumulate_tile
from dcnv3_tvm.schedules.cpu.neon import fits_lanes, sum_by_lane
from dcnv3_tvm.schedules.cpu.register_tiles import (
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
from dcnv3_tvm.schedules.rule import Refusal, refuse_other_kernels
from dcnv3_tvm.schedules.space import SearchSpace

_ALL: Final = 0
"""Candidate of ``block`` for all row tiles: tasks iterate over rows first."""

_BLOCKS: Final = (1, 2, 4, 8, 16, _ALL)
"""Candidates for the row tiles of a cache block."""


def matmul(func: tirx.PrimFunc, target: Target, space: SearchSpace) -> tirx.PrimFunc | Refusal:
    """Schedule matmuls with packed weights.

    A task is a register tile of sums, which stay in registers over the whole of K. While the
    weights fit the L2 cache, tasks iterate over columns first. Otherwise they iterate over rows
    first, so that each weight tile is read from memory once. Blocks of row tiles in between stay in
    the cache while tasks iterate over the weights.
    """
    if refusal := refuse_other_kernels(func, "matmul"):
        return refusal
    weight = func.params[1]
    dtype = str(weight.dtype)
    unit = vector_unit(target)
    resident = weights_stay_cached(weight)
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
        block = space.pick(numbered("block", index), _BLOCKS, 1 if resident else _ALL)

        # Step 2. Tile the output and run tiles in parallel.
        row_outer, row_inner = sch.split(row, [None, rows])
        column_outer, column_inner = sch.split(column, [None, columns])
        order = [row_outer, column_outer] if block == 1 else [column_outer, row_outer]
        if block not in (1, _ALL):
            together = largest_divisor(static(sch.get(row_outer).extent) or 1, block)
            first, second = sch.split(row_outer, [None, together])
            order = [first, column_outer, second]
        sch.reorder(*order, row_inner, column_inner)
        task = sch.fuse(*order)
        sch.parallel(task)

        # Step 3. Accumulate a tile in registers.
        sch.compute_at(sums, task, preserve_unit_loops=True)
        sch.set_scope(sums, 0, "local")
        if fits_lanes(unit, columns, inputs, dtype):
            sum_by_lane(sch, sums, task, [], dtype)
        elif dtype == "bfloat16" and not unit.by_lane:
            sum_pairs(sch, sums, task)
        else:
            *_, tile_row, tile_column, depth = sch.get_loops(sums)
            spilled = rows > unspilled_rows(columns, unit, dtype)
            depth, tile_depth = unrolled_depth(sch, depth, space, index, spilled=spilled)
            sch.reorder(depth, tile_depth, tile_row, tile_column)
            accumulate_tile(sch, sums, [tile_depth, tile_row, tile_column], depth)

        # Step 4. Apply the epilogue to the tile.
        sch.unroll(row_inner)
        sch.vectorize(column_inner)
    return sch.mod["main"]
