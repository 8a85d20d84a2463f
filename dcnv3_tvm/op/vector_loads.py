"""The sum of DCNv3 over sampling points, with explicit vector loads of channels (GPUs).

A thread first copies the four pixels of a point into registers, in vectors of
`SamplingKernel.vector_channels` channels, and then adds them up.
"""

from __future__ import annotations

from typing import Any

from tvm import tirx
from tvm.tirx.script import builder as T

from dcnv3_tvm.op.expr import int64
from dcnv3_tvm.op.prim_func_builder import block, compute
from dcnv3_tvm.op.sampling_kernel import Buffers, SamplingKernel


def emit_vector_index(kernel: SamplingKernel, buffers: Buffers) -> None:
    """Compute the index in x, in vectors, of the first pixel of each patch and of its group."""
    spec, sizes, dtype = kernel.spec, kernel.sizes, kernel.index_dtype
    vectors = int64(spec.channels // kernel.vector_channels)
    group_vectors = int64(spec.group_channels // kernel.vector_channels)

    def index(n: Any, y: Any, x: Any, g: Any, p: Any) -> Any:
        row, column = (
            tirx.Cast(dtype, tirx.Cast("int32", buffer[n, y, x, g, p]))
            for buffer in (buffers.row, buffers.column)
        )
        relative = row * tirx.Cast(dtype, sizes.width) + column
        # The part that the points of a group share is a separate term, so that it is computed once.
        anchor = (n * sizes.height + kernel.rows.anchor(y)) * sizes.width + kernel.columns.anchor(x)
        shared = anchor * vectors + g * group_vectors
        return relative * tirx.Cast(dtype, vectors) + tirx.Cast(dtype, shared)

    compute("pixels", kernel.point_extents, index, dtype=dtype, into=buffers.index)


def emit_patch(kernel: SamplingKernel, buffers: Buffers, x_tensor: Any) -> None:
    """Copy the four pixels of every point."""
    height, width = kernel.sizes.height, kernel.sizes.width
    extents = (*kernel.point_extents, 2, 2, kernel.channel_extents[-1])
    with block("patch", extents, "SSSSSSSS") as (n, y, x, g, p, r, s, c):
        index = buffers.index[n, y, x, g, p]
        # The pixels read depend on data: declare the whole image.
        T.reads(index, x_tensor[n, 0:height, 0:width, kernel.channel(g, c)])
        T.writes(buffers.patch[n, y, x, g, p, r, s, c])
        # The whole position is in the last index, beyond the extent of its axis: when TVM flattens
        # x, this is the intended element.
        element = x_tensor[0, 0, 0, _patch_element(kernel, index, r, s, c)]
        T.buffer_store(buffers.patch, element, [n, y, x, g, p, r, s, c])


def emit_sum(kernel: SamplingKernel, buffers: Buffers) -> None:
    """Add up the four weighted pixels of every point."""
    weight, total, patch = buffers.weight, buffers.total, buffers.patch
    extents = (*kernel.point_extents, 2, 2, kernel.channel_extents[-1])
    with block("sum", extents, "SSSSRRRS") as (n, y, x, g, p, r, s, c):
        with T.init():
            T.buffer_store(total, kernel.constant(0), [n, y, x, g, c])
        term = weight[n, y, x, g, r, s, p] * kernel.cast(patch[n, y, x, g, p, r, s, c])
        T.buffer_store(total, total[n, y, x, g, c] + term, [n, y, x, g, c])


def emit_center(kernel: SamplingKernel, buffers: Buffers, x_tensor: Any) -> None:
    """Copy the pixel of x at each output pixel, for the blend."""
    compute(
        "center",
        kernel.channel_extents,
        lambda n, y, x, g, c: x_tensor[n, y, x, kernel.channel(g, c)],
        dtype=kernel.spec.dtype,
        into=buffers.center,
    )


def _patch_element(kernel: SamplingKernel, index: Any, r: Any, s: Any, channel: Any) -> Any:
    """Return the place, in the flattened x, of a channel of a group at corner (r, s) of a patch.

    The addition is unsigned, because nvcc would do a signed one in 64 bits.
    """
    vector = int64(kernel.vector_channels)
    unsigned = f"u{kernel.index_dtype}"
    first = tirx.Cast(unsigned, index) + tirx.Cast(unsigned, tirx.floordiv(channel, vector))
    pixels = kernel.rows.step * r * kernel.sizes.width + kernel.columns.step * s
    corner = pixels * int64(kernel.spec.channels)
    return tirx.Cast("int64", first) * vector + corner + tirx.floormod(channel, vector)
