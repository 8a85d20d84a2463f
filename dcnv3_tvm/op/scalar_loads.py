"""The sum of DCNv3 over sampling points, with loads that LLVM vectorizes over channels (CPUs)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tvm import tirx
from tvm.tirx.script import builder as T

from dcnv3_tvm.op.expr import int64, static
from dcnv3_tvm.op.prim_func_builder import block, compute
from dcnv3_tvm.op.sampling_kernel import Buffers, SamplingKernel


def emit_offsets(kernel: SamplingKernel, buffers: Buffers, offset: Any) -> None:
    """Separate the offsets along x from those along y, which alternate."""
    compute(
        "offsets",
        (*kernel.point_extents[:3], 2, *kernel.point_extents[3:]),
        lambda n, y, x, axis, g, p: kernel.cast(kernel.offset_at(offset, (n, y, x, g, p), axis)),
        dtype=kernel.dtype,
        into=buffers.offset,
    )


def emit_shift(kernel: SamplingKernel, buffers: Buffers, mask: Any) -> Any:
    """Compute the logits relative to the largest of the group."""
    return compute(
        "softmax_shift",
        kernel.point_extents,
        lambda *at: kernel.mask_at(mask, at) - buffers.max_logit[at[:-1]],
        dtype=kernel.dtype,
    )


def emit_share(kernel: SamplingKernel, buffers: Buffers) -> None:
    """Compute the reciprocal of the sum of exponentials, for each group."""
    compute(
        "softmax_share",
        kernel.group_extents,
        lambda *at: kernel.constant(1) / buffers.exp_sum[at],
        dtype=kernel.dtype,
        into=buffers.share,
    )


def emit_pixel_index(kernel: SamplingKernel, buffers: Buffers) -> None:
    """Compute the index ``row * W + column`` of the first pixel of each patch."""
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
    extents = (*kernel.point_extents, 2, kernel.channel_extents[-1])
    with block("sum", extents, "SSSSRSS") as (n, y, x, g, p, r, c):
        channel = kernel.channel(g, c)
        at = n, y, x, g, p
        first, second = (patch_pixel(kernel, buffers, at, r, s) for s in (0, 1))
        weights = [weight[kernel.weight_place(at, r, s)] for s in (0, 1)]
        # The pixels read depend on data: declare the whole image.
        T.reads(
            weight[n, y, x, r, 0:2, g, p],
            buffers.index[at],
            x_tensor[n, 0:height, 0:width, channel],
        )
        T.writes(total[n, y, x, g, r, c])
        with T.init():
            T.buffer_store(total, kernel.constant(0), [n, y, x, g, r, c])
        # One after the other, so that each is a multiply-add. Two sums per channel, because each
        # waits for the one before it.
        value = total[n, y, x, g, r, c]
        for factor, (row, column) in zip(weights, (first, second), strict=True):
            value = value + factor * kernel.cast(x_tensor[n, row, column, channel])
        T.buffer_store(total, value, [n, y, x, g, r, c])


def patch_pixel(
    kernel: SamplingKernel, buffers: Buffers, at: Sequence[Any], r: Any, s: Any
) -> tuple[Any, Any]:
    """Return row and column of corner (r, s) of the patch at (n, ho, wo, g, p).

    For a static width, TVM simplifies them back to the index of the patch when it flattens the
    image. For a dynamic one, which would take a division, the whole index is the column, beyond its
    extent: when TVM flattens the image, this is the intended element.
    """
    width = kernel.sizes.width
    if static(width) is None:
        return int64(0), patch_index(kernel, buffers, at, r, s)
    index = tirx.Cast("int64", buffers.index[tuple(at)])
    top, left = tirx.floordiv(index, width), tirx.floormod(index, width)
    return top + kernel.rows.step * r, left + kernel.columns.step * s


def patch_index(kernel: SamplingKernel, buffers: Buffers, at: Sequence[Any], r: Any, s: Any) -> Any:
    """Return the index ``row * W + column`` of corner (r, s) of the patch at (n, ho, wo, g, p)."""
    first = tirx.Cast("int64", buffers.index[tuple(at)])
    return first + kernel.rows.step * r * kernel.sizes.width + kernel.columns.step * s
