"""The sum of DCNv3 over sampling points, with loads that LLVM vectorizes over channels (CPUs)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from tvm import tirx
from tvm.tirx.script import builder as T

from dcnv3_tvm.op.prim_func_builder import block, compute
from dcnv3_tvm.op.sampling_kernel import Buffers, SamplingKernel

CORNERS: Final = ((0, 0), (0, 1), (1, 0), (1, 1))
"""(row, column) of the pixels of a patch."""


def emit_pixel_index(kernel: SamplingKernel, buffers: Buffers) -> None:
    """Compute the index ``row * W + column`` of the first pixel of each patch.

    Only for a static width, by which `patch_pixel` divides without an instruction.
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
        at = n, y, x, g, p
        corners = [patch_pixel(kernel, buffers, at, r, s) for r, s in CORNERS]
        # The pixels read depend on data: declare the whole image.
        T.reads(
            weight[n, y, x, g, 0:2, 0:2, p],
            *pixel_sources(kernel, buffers, at),
            x_tensor[n, 0:height, 0:width, channel],
        )
        T.writes(total[n, y, x, g, c])
        with T.init():
            T.buffer_store(total, kernel.constant(0), [n, y, x, g, c])
        first, *others = (
            weight[n, y, x, g, r, s, p] * kernel.cast(x_tensor[n, row, column, channel])
            for (r, s), (row, column) in zip(CORNERS, corners, strict=True)
        )
        # The four corners are added up first, which shortens the chain of dependent additions.
        patch_sum = sum(others, start=first)
        T.buffer_store(total, total[n, y, x, g, c] + patch_sum, [n, y, x, g, c])


def pixel_sources(kernel: SamplingKernel, buffers: Buffers, at: Sequence[Any]) -> list[Any]:
    """Return what `patch_pixel` reads at (n, ho, wo, g, p)."""
    place = tuple(at)
    if kernel.has_pixel_index:
        return [buffers.index[place]]
    return [buffers.row[place], buffers.column[place]]


def patch_pixel(
    kernel: SamplingKernel, buffers: Buffers, at: Sequence[Any], r: Any, s: Any
) -> tuple[Any, Any]:
    """Return row and column of corner (r, s) of the patch at (n, ho, wo, g, p).

    For a static width, TVM simplifies them back to the index of the patch when it flattens the
    image.
    """
    if kernel.has_pixel_index:
        index, width = tirx.Cast("int64", buffers.index[tuple(at)]), kernel.sizes.width
        top, left = tirx.floordiv(index, width), tirx.floormod(index, width)
    else:
        top, left = _first_pixel(kernel, buffers, at)
    return top + kernel.rows.step * r, left + kernel.columns.step * s


def patch_index(kernel: SamplingKernel, buffers: Buffers, at: Sequence[Any], r: Any, s: Any) -> Any:
    """Return the index ``row * W + column`` of corner (r, s) of the patch at (n, ho, wo, g, p)."""
    width = kernel.sizes.width
    if kernel.has_pixel_index:
        first = tirx.Cast("int64", buffers.index[tuple(at)])
    else:
        top, left = _first_pixel(kernel, buffers, at)
        first = top * width + left
    return first + kernel.rows.step * r * width + kernel.columns.step * s


def _first_pixel(kernel: SamplingKernel, buffers: Buffers, at: Sequence[Any]) -> tuple[Any, Any]:
    """Return row and column of the first pixel of the patch at (n, ho, wo, g, p)."""
    _, y, x, *_ = place = tuple(at)
    row, column = (
        tirx.Cast("int64", tirx.Cast("int32", relative[place]))
        for relative in (buffers.row, buffers.column)
    )
    return row + kernel.rows.anchor(y), column + kernel.columns.anchor(x)
