"""Schedule of matrix products with packed weights."""

from __future__ import annotations

from tvm import s_tir, tirx
from tvm.target import Target

from dcnv3_tvm.op.stages import KERNEL_ATTR
from dcnv3_tvm.schedules.cpu.dot_product import sum_pairs
from dcnv3_tvm.schedules.cpu.tiling import (
    product_blocks,
    row_tile,
    tile_columns,
    unroll_tile,
    vector_unit,
    weights_stay_cached,
)
from dcnv3_tvm.spec import DTYPE_BYTES


def linear(func: tirx.PrimFunc, target: Target) -> tirx.PrimFunc | None:
    """Give every task one register tile of sums, kept in registers over the whole of K.

    Tasks run over the columns first while the weights fit the cache, else over the rows first, so
    that a column tile of weights is read from memory once.
    """
    if func.attrs.get(KERNEL_ATTR) != "linear":
        return None
    weight = func.params[1]
    dtype = str(weight.dtype)
    unit = vector_unit(target)
    resident = weights_stay_cached(weight)
    row_bytes = int(func.params[0].shape[-1]) * DTYPE_BYTES[dtype]
    sch = s_tir.Schedule(func)
    for sums, epilogue in product_blocks(sch):
        row, column = sch.get_loops(epilogue)
        columns = tile_columns(sch, column, weight)
        rows = row_tile(sch.get(row).extent, columns, unit, dtype, row_bytes)
        row_outer, row_inner = sch.split(row, [None, rows])
        column_outer, column_inner = sch.split(column, [None, columns])
        order = [row_outer, column_outer] if resident else [column_outer, row_outer]
        sch.reorder(*order, row_inner, column_inner)
        task = sch.fuse(*order)
        sch.parallel(task)
        sch.compute_at(sums, task, preserve_unit_loops=True)
        sch.set_scope(sums, 0, "local")
        if dtype == "bfloat16":
            sum_pairs(sch, sums, task)
        else:
            *_, tile_row, tile_column, depth = sch.get_loops(sums)
            sch.reorder(depth, tile_row, tile_column)
            unroll_tile(sch, sums, [tile_row, tile_column], depth)
        sch.unroll(row_inner)
        sch.vectorize(column_inner)
    return sch.mod["main"]
