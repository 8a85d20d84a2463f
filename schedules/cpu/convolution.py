"""Schedule of dense convolutions with packed weights."""

from __future__ import annotations

from typing import Final

from tvm import s_tir, tirx
from tvm.target import Target

from dcnv3_tvm.schedules.cpu.register_tiles import (
    copy_in_parallel,
    copy_in_task,
    numbered,
    product_blocks,
    row_tile,
    row_tiles,
    tile_columns,
    unroll_tile,
    unrolled_depth,
    unspilled_rows,
    vector_unit,
    weights_stay_cached,
)
from dcnv3_tvm.schedules.rule import Refusal, refuse_other_kernels
from dcnv3_tvm.schedules.space import SearchSpace

_ROW: Final = "row"
"""A task is an output row, and frames its input rows."""

_ROWS_FIRST: Final = "image, rows first"
"""The whole image is framed before; tasks run over the pixels, and in them over the columns."""

_COLUMNS_FIRST: Final = "image, columns first"
"""The whole image is framed before; tasks run over the columns, and in them over the pixels."""


def convolution(func: tirx.PrimFunc, target: Target, space: SearchSpace) -> tirx.PrimFunc | Refusal:
    """Give every register tile a run of pixels of one output row, and its sums the registers.

    While the weights fit the cache, a task is an output row, which copies the input rows it needs
    into their frame of zeros. Else the whole image is framed first, and tasks run over the output
    channels first, so that a column tile of weights is read from memory once.
    """
    if refusal := refuse_other_kernels(func, "convolution"):
        return refusal
    weight = func.params[1]
    dtype = str(weight.dtype)
    unit = vector_unit(target)
    resident = weights_stay_cached(weight)
    sch = s_tir.Schedule(func)
    padded = sch.get_sblock("padded")
    parts = product_blocks(sch)
    plans = (
        [_ROW, _ROWS_FIRST, _COLUMNS_FIRST] if len(parts) == 1 else [_ROWS_FIRST, _COLUMNS_FIRST]
    )
    plan = space.pick("plan", plans, plans[0] if resident else _COLUMNS_FIRST)
    for index, (sums, epilogue) in enumerate(parts):
        batch, line, pixel, column = sch.get_loops(epilogue)
        columns = tile_columns(sch, column, weight)
        extent = sch.get(pixel).extent
        rows = row_tile(extent, columns, unit, dtype)
        rows = space.pick(numbered("rows", index), row_tiles(extent), rows)
        pixel_outer, pixel_inner = sch.split(pixel, [None, rows])
        column_outer, column_inner = sch.split(column, [None, columns])
        order = [batch, line, pixel_outer, column_outer]
        if plan == _COLUMNS_FIRST:
            order = [column_outer, batch, line, pixel_outer]
        sch.reorder(*order, pixel_inner, column_inner)
        if plan == _ROW:
            sch.parallel(sch.fuse(batch, line))
            task = column_outer
        else:
            task = sch.fuse(*order)
            sch.parallel(task)
        sch.compute_at(sums, task, preserve_unit_loops=True)
        sch.set_scope(sums, 0, "local")
        *_, tile_pixel, tile_column, high, wide, depth = sch.get_loops(sums)
        spilled = rows > unspilled_rows(columns, unit, dtype)
        depth, tile_depth = unrolled_depth(sch, depth, space, index, spilled=spilled)
        sch.reorder(high, wide, depth, tile_depth, tile_pixel, tile_column)
        unroll_tile(sch, sums, [tile_depth, tile_pixel, tile_column], high)
        sch.unroll(pixel_inner)
        sch.vectorize(column_inner)
    if plan == _ROW:
        copy_in_task(sch, padded, sch.get_loops(parts[0][1])[0], unit.lanes(dtype))
    else:
        copy_in_parallel(sch, padded, unit.lanes(dtype))
    return sch.mod["main"]
