"""Dense convolutions with packed weights on CPUs: register tiles of pixels x output channels."""

from __future__ import annotations

from typing import Final

from tvm import s_tir, tirx
from tvm.target import Target

from dcnv3_tvm.op.expr import product
from dcnv3_tvm.schedules.cpu.loops import accumulate_tile, copy_in_parallel, copy_in_task
from dcnv3_tvm.schedules.cpu.neon import fits_lanes, sum_by_lane
from dcnv3_tvm.schedules.cpu.register_tiles import (
    SPILLED_STEPS,
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

_ROW: Final = "row"
"""A task is an output row and pads the input rows that it reads."""

_ROWS_FIRST: Final = "image, rows first"
"""The whole image is padded first; tasks iterate over pixels, then output channels."""

_COLUMNS_FIRST: Final = "image, columns first"
"""The whole image is padded first; tasks iterate over output channels, then pixels."""


def convolution(func: tirx.PrimFunc, target: Target, space: SearchSpace) -> tirx.PrimFunc | Refusal:
    """Schedule dense convolutions.

    A register tile holds the sums of a run of pixels of one output row. While the weights fit the
    L2 cache, a task is an output row. Otherwise tasks iterate over output channels first, so that
    each weight tile is read from memory once, and prefetch the next.
    """
    if refusal := refuse_other_kernels(func, "convolution"):
        return refusal
    weight = func.params[1]
    dtype = str(weight.dtype)
    unit = vector_unit(target)
    inputs = int(func.params[0].shape[-1])
    sch = s_tir.Schedule(func)
    padded = sch.get_sblock("padded")
    parts = matmul_blocks(sch)

    # Step 1. Choose the tasks. Parts with blocks of their own cannot share a padded row. Without
    # padded rows, pad the whole image.
    plans = [_ROWS_FIRST, _COLUMNS_FIRST]
    if len(parts) == 1:
        plans.insert(0, _ROW)
    default = plans[0] if weights_stay_cached(weight) else _COLUMNS_FIRST
    plan = space.pick("plan", plans, default)
    if plan != _ROW:
        copy_in_parallel(sch, padded, unit.lanes(dtype))

    for index, (sums, epilogue) in enumerate(parts):
        # Step 2. Tile the output by pixels and output channels.
        batch, line, pixel, column = sch.get_loops(epilogue)
        columns = tile_columns(sch, column, weight)
        extent = sch.get(pixel).extent
        rows = row_tile(extent, columns, unit, dtype)
        rows = space.pick(numbered("rows", index), row_tiles(extent), rows)
        pixel_outer, pixel_inner = sch.split(pixel, [None, rows])
        column_outer, column_inner = sch.split(column, [None, columns])
        outputs = [sch.get(loop).extent for loop in (batch, line, pixel_outer)]
        order = [batch, line, pixel_outer, column_outer]
        if plan == _COLUMNS_FIRST:
            order = [column_outer, batch, line, pixel_outer]
        sch.reorder(*order, pixel_inner, column_inner)

        # Step 3. Run tasks in parallel.
        if plan == _ROW:
            line = sch.fuse(batch, line)
            sch.parallel(line)
            task = column_outer
        else:
            task = sch.fuse(*order)
            sch.parallel(task)

        # Step 4. Accumulate a tile in registers, then apply the epilogue to it. The input rows are
        # padded before, because the scheduler sees no reads of a block replaced by an intrinsic.
        sch.compute_at(sums, task, preserve_unit_loops=True)
        sch.set_scope(sums, 0, "local")
        if plan == _ROW:
            copy_in_task(sch, padded, line, unit.lanes(dtype))
        *_, tile_pixel, tile_column, high, wide, depth = sch.get_loops(sums)
        if fits_lanes(unit, columns, inputs, dtype):
            sum_by_lane(sch, sums, task, [high, wide], dtype)
        else:
            spilled = rows > unspilled_rows(columns, unit, dtype)
            most = SPILLED_STEPS if spilled else 1
            depth, tile_depth = unrolled_depth(sch, depth, space, index, most=most)
            sch.reorder(high, wide, depth, tile_depth, tile_pixel, tile_column)
            accumulate_tile(sch, sums, [tile_depth, tile_pixel, tile_column], high)
            if plan == _COLUMNS_FIRST and index == 0:
                number, turns = sch.get(task).loop_var, product(outputs)
                use = WeightUse(tirx.floordiv(number, turns), tirx.floormod(number, turns), turns)
                prefetch_next_tile(sch, weight, use, [high, wide, depth])
        sch.unroll(pixel_inner)
        sch.vectorize(column_inner)
    return sch.mod["main"]
