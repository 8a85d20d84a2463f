"""Schedule of dense convolutions with packed weights."""

from __future__ import annotations

from tvm import s_tir, tirx
from tvm.target import Target

from dcnv3_tvm.op.stages import KERNEL_ATTR
from dcnv3_tvm.schedules.cpu.tiling import (
    copy_in_parallel,
    copy_in_task,
    product_blocks,
    row_tile,
    tile_columns,
    unroll_tile,
    vector_unit,
    weights_stay_cached,
)


def convolution(func: tirx.PrimFunc, target: Target) -> tirx.PrimFunc | None:
    """Give every register tile a run of pixels of one output row, and its sums the registers.

    While the weights fit the cache, a task is an output row, which copies the input rows it needs
    into their frame of zeros. Else the whole image is framed first, and tasks run over the output
    channels first, so that a column tile of weights is read from memory once.
    """
    if func.attrs.get(KERNEL_ATTR) != "convolution":
        return None
    weight = func.params[1]
    dtype = str(weight.dtype)
    unit = vector_unit(target)
    resident = weights_stay_cached(weight)
    sch = s_tir.Schedule(func)
    padded = sch.get_sblock("padded")
    parts = product_blocks(sch)
    by_row = resident and len(parts) == 1
    for sums, epilogue in parts:
        batch, line, pixel, column = sch.get_loops(epilogue)
        columns = tile_columns(sch, column, weight)
        rows = row_tile(sch.get(pixel).extent, columns, unit, dtype)
        pixel_outer, pixel_inner = sch.split(pixel, [None, rows])
        column_outer, column_inner = sch.split(column, [None, columns])
        order = [batch, line, pixel_outer, column_outer]
        if not resident:
            order = [column_outer, batch, line, pixel_outer]
        sch.reorder(*order, pixel_inner, column_inner)
        if by_row:
            sch.parallel(sch.fuse(batch, line))
            task = column_outer
        else:
            task = sch.fuse(*order)
            sch.parallel(task)
        sch.compute_at(sums, task, preserve_unit_loops=True)
        sch.set_scope(sums, 0, "local")
        *_, tile_pixel, tile_column, high, wide, depth = sch.get_loops(sums)
        sch.reorder(high, wide, depth, tile_pixel, tile_column)
        unroll_tile(sch, sums, [tile_pixel, tile_column], high)
        sch.unroll(pixel_inner)
        sch.vectorize(column_inner)
    if by_row:
        copy_in_task(sch, padded, sch.get_loops(parts[0][1])[0], unit.lanes(dtype))
    else:
        copy_in_parallel(sch, padded, unit.lanes(dtype))
    return sch.mod["main"]
