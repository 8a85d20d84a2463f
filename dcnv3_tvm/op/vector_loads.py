"""The sum of DCNv3 over sampling points, with explicit vector loads of channels (GPUs).

A thread first copies the four pixels of a point into registers, in vectors of
`SamplingKernel.vector_channels` channels, and then adds them up.
"""

from __future__ import annotations

from typing import Any

from tvm import tirx
from tvm.tirx.script import builder as T

from dcnv3_tvm.op.atomic_add import add_multiple
from dcnv3_tvm.op.expr import int64
from dcnv3_tvm.op.prim_func_builder import allocate, block, compute
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


def emit_dot(kernel: SamplingKernel, buffers: Buffers, grad: Any) -> Any:
    """Compute the gradient times each pixel, over channels; (N, Ho, Wo, G, 2, 2, P).

    A block ``grad`` converts the gradient, once for all pixels.
    """
    converted = compute(
        "grad",
        kernel.channel_extents,
        lambda n, y, x, g, c: kernel.cast(grad[n, y, x, kernel.channel(g, c)]),
        dtype=kernel.dtype,
    )
    *group, points = kernel.point_extents
    dot = allocate("dot", (*group, 2, 2, points), kernel.dtype)
    extents = (*kernel.point_extents, 2, 2, kernel.channel_extents[-1])
    with block("dot", extents, "SSSSSSSR") as (n, y, x, g, p, r, s, c):
        with T.init():
            T.buffer_store(dot, kernel.constant(0), [n, y, x, g, r, s, p])
        term = converted[n, y, x, g, c] * kernel.cast(buffers.patch[n, y, x, g, p, r, s, c])
        T.buffer_store(dot, dot[n, y, x, g, r, s, p] + term, [n, y, x, g, r, s, p])
    return dot


def emit_zero(kernel: SamplingKernel, image: Any) -> None:
    """Set a tensor of the size of x to zero."""
    zero = kernel.constant(0)
    compute("zero", image.shape, lambda *_: zero, dtype=kernel.dtype, into=image)


def emit_scatter(kernel: SamplingKernel, buffers: Buffers, grad: Any, image: Any) -> None:
    """Add the weighted gradient to the four pixels of every point, atomically, in vectors."""
    height, width = kernel.sizes.height, kernel.sizes.width
    vector = kernel.vector_channels
    vectors = kernel.spec.group_channels // vector
    extents = (*kernel.point_extents, 2, 2, vectors)
    with block("scatter", extents, "SSSSSSSS") as (n, y, x, g, p, r, s, v):
        index, weight = buffers.index[n, y, x, g, p], buffers.weight[n, y, x, g, r, s, p]
        first = v * int64(vector)
        channel = kernel.channel(g, first)
        # The pixels written depend on data: declare the whole image. It is declared as read,
        # because what TVM takes for a sum has one block that writes it, and that is ``zero``.
        T.reads(
            index,
            weight,
            grad[n, y, x, g, first : first + vector],
            image[n, 0:height, 0:width, channel : channel + vector],
        )
        T.writes()
        address = T.address_of(image[0, 0, 0, _patch_element(kernel, index, r, s, first)])
        values = [grad[n, y, x, g, first + i] for i in range(vector)]
        T.evaluate(add_multiple(address, weight, values))


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
