"""The sum of DCNv3 over sampling points, with loads that LLVM vectorizes over channels (CPUs)."""

from __future__ import annotations

from typing import Any, Final

from tvm import tirx
from tvm.tirx.script import builder as T

from dcnv3_tvm.op.prim_func_builder import block, compute
from dcnv3_tvm.op.sampling_kernel import Buffers, SamplingKernel

_CORNERS: Final = ((0, 0), (0, 1), (1, 0), (1, 1))
"""(row, column) of the pixels of a patch."""


def emit_pixel_index(kernel: SamplingKernel, buffers: Buffers) -> None:
    """Compute the index ``row * W + column`` of the first pixel of each patch.

    Only for a static width, by which `_indexed_pixel` divides without an instruction.
    """
    dtype = kernel.index_dtype

    def absolute(relative: Any, anchor: Any) -> Any:
        return tirx.Cast(dtype, tirx.Cast("int32", relative)) + tirx.Cast(dtype, anchor)

    def index(n: Any, y: Any, x: Any, g: Any, p: Any) -> Any:
        row = absolute(buffers.row[n, y, x, g, p], kernel.rows.anchor(y))
        column = absolute(buffers.column[n, y, x, g, p], kernel.columns.anchor(x))
        return row * tirx.Cast(dtype, kernel.sizes.width) + column

    compute("pixels", kernel.point_extents, index, dtype=dtype, into=buffers.index)


def emit_sum(kernel: SamplingKernel, buffers: Buffers, x_tensor: Any) -> None:
    """Add up the four weighted pixels of every point."""
    weight, total = buffers.weight, buffers.total
    height, width = kernel.sizes.height, kernel.sizes.width
    extents = (*kernel.point_extents, kernel.channel_extents[-1])
    with block("sum", extents, "SSSSRS") as (n, y, x, g, p, c):
        channel = kernel.channel(g, c)
        sources: tuple[Any, ...]
        if kernel.has_pixel_index:
            index = buffers.index[n, y, x, g, p]
            sources = (index,)
            corners = [_indexed_pixel(kernel, index, r, s) for r, s in _CORNERS]
        else:
            row, column = buffers.row[n, y, x, g, p], buffers.column[n, y, x, g, p]
            sources = (row, column)
            corners = [_pixel(kernel, row, column, y, x, r, s) for r, s in _CORNERS]
        # The pixels read depend on data: declare the whole image.
        T.reads(weight[n, y, x, g, 0:2, 0:2, p], *sources, x_tensor[n, 0:height, 0:width, channel])
        T.writes(total[n, y, x, g, c])
        with T.init():
            T.buffer_store(total, kernel.constant(0), [n, y, x, g, c])
        first, *others = (
            weight[n, y, x, g, r, s, p] * kernel.cast(x_tensor[n, row, column, channel])
            for (r, s), (row, column) in zip(_CORNERS, corners, strict=True)
        )
        # The four corners are added up first, which shortens the chain of dependent additions.
        patch_sum = sum(others, start=first)
        T.buffer_store(total, total[n, y, x, g, c] + patch_sum, [n, y, x, g, c])


def _indexed_pixel(kernel: SamplingKernel, index: Any, r: int, s: int) -> tuple[Any, Any]:
    """Return row and column of corner (r, s) of the patch with an index.

    TVM simplifies them back to the index when it flattens x, because the width is static.
    """
    index, width = tirx.Cast("int64", index), kernel.sizes.width
    return (
        tirx.floordiv(index, width) + kernel.rows.step * r,
        tirx.floormod(index, width) + kernel.columns.step * s,
    )


def _pixel(
    kernel: SamplingKernel, row: Any, column: Any, y: Any, x: Any, r: int, s: int
) -> tuple[Any, Any]:
    """Return row and column of corner (r, s) of the patch at a relative row and column."""
    top = tirx.Cast("int64", tirx.Cast("int32", row)) + kernel.rows.anchor(y)
    left = tirx.Cast("int64", tirx.Cast("int32", column)) + kernel.columns.anchor(x)
    return top + kernel.rows.step * r, left + kernel.columns.step * s
