"""The blocks of the gradient kernels of DCNv3, next to those of `dcnv3_tvm.op.sampling`.

`dcnv3_tvm.op.reference_gradient` states the formulas. Two kernels compute them, because their
parallel loops differ: the gradient of x is scattered to the pixels that were read, so that one task
owns a group of an image; those of offset and mask are computed for each output pixel. Both begin
with the blocks ``softmax_*``, ``coordinates``, ``corners`` and ``pixels`` of the forward kernel,
with vector loads also ``patch``.

================ =================================================================================
block            what it computes
================ =================================================================================
weights          for x: bilinear weights times the mask, as in the forward kernel
grad             gradient of the result in the accumulation type, divided by the softmax's sum
scatter          for x: weights times gradient, added to the four pixels of every point
axis_weights     for offset and mask: bilinear weights and their slopes, along each axis
dot              for offset and mask: sum over channels of gradient times pixel, for each corner
grad_mask        for offset and mask: gradient of the mask before that of the softmax; with vector
                 loads, that of the offset, too
softmax_dot      with softmax: sum over the points of mask times its gradient
store            for offset and mask: the gradients, rounded to the types of the results
================ =================================================================================
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from tvm import tirx
from tvm.tirx.script import builder as T

from dcnv3_tvm.op import vector_loads
from dcnv3_tvm.op.expr import int64
from dcnv3_tvm.op.prim_func_builder import allocate, block, compute
from dcnv3_tvm.op.sampling import emit_index, emit_points, emit_weights
from dcnv3_tvm.op.sampling_kernel import Buffers, SamplingKernel
from dcnv3_tvm.op.scalar_loads import patch_index, patch_pixel


def emit_grad_x(kernel: SamplingKernel, grad: Any, offset: Any, mask: Any, out: Any) -> None:
    """Add all blocks of the kernel that computes the gradient of x.

    Parameters
    ----------
    kernel : SamplingKernel
        The kernel.
    grad, offset, mask : buffer
        The function's arguments; ``grad`` is the gradient of the result.
    out : buffer
        The gradient of x, in the accumulation type, in which the terms of a pixel are added.
    """
    buffers = Buffers.of(kernel, without=("total", "patch", "share"))
    emit_points(kernel, buffers, offset, mask)
    emit_weights(kernel, buffers, mask)
    emit_index(kernel, buffers)

    def scaled(n: Any, y: Any, x: Any, g: Any, c: Any) -> Any:
        value = kernel.cast(grad[n, y, x, kernel.channel(g, c)])
        return value / buffers.exp_sum[n, y, x, g] if kernel.spec.softmax else value

    source = compute("grad", kernel.channel_extents, scaled, dtype=kernel.dtype)
    if kernel.vector_loads:
        vector_loads.emit_zero(kernel, out)
        vector_loads.emit_scatter(kernel, buffers, source, out)
    else:
        _emit_scatter(kernel, buffers, source, out)


def _emit_scatter(kernel: SamplingKernel, buffers: Buffers, grad: Any, image: Any) -> None:
    """Add the weighted gradient to the four pixels of every point."""
    batch, height, width = kernel.sizes.input_shape(0)[:3]
    _, out_height, out_width, group, points = kernel.point_extents
    extents = (batch, group, out_height, out_width, points, 2, 2, kernel.channel_extents[-1])
    with block("scatter", extents, "SSRRRRRS") as (n, g, y, x, p, r, s, c):
        at, channel = (n, y, x, g, p), kernel.channel(g, c)
        weight = buffers.weight[kernel.weight_place(at, r, s)]
        # The pixels written depend on data: declare the whole image.
        region = image[n, 0:height, 0:width, channel]
        T.reads(weight, grad[n, y, x, g, c], buffers.index[at], region)
        T.writes(region)
        with T.init(), T.grid(height, width) as (i, j):
            T.buffer_store(image, kernel.constant(0), [n, i, j, channel])
        # A bound variable, because TVM takes a block whose reduction axes are in the indices it
        # writes for one that cannot be scheduled. The whole position is in the index of the column,
        # beyond its extent: when TVM flattens the image, this is the intended element.
        pixel = T.Bind(patch_index(kernel, buffers, at, r, s))
        value = image[n, 0, pixel, channel] + weight * grad[n, y, x, g, c]
        T.buffer_store(image, value, [n, 0, pixel, channel])


def emit_grad_offset_mask(
    kernel: SamplingKernel,
    x: Any,
    offset: Any,
    mask: Any,
    grad: Any,
    grad_offset: Any,
    grad_mask: Any,
) -> None:
    """Add all blocks of the kernel that computes the gradients of offset and mask.

    Parameters
    ----------
    kernel : SamplingKernel
        The kernel.
    x, offset, mask, grad, grad_offset, grad_mask : buffer
        The function's arguments: those of the operator, gradient of the result, and the gradients
        to compute.
    """
    spec = kernel.spec
    buffers = Buffers.of(kernel, without=("total", "weight", "share"))
    emit_points(kernel, buffers, offset, mask)
    emit_index(kernel, buffers)
    if kernel.vector_loads:
        vector_loads.emit_patch(kernel, buffers, x)
    rows, columns = _emit_axis_weights(kernel, buffers)
    if kernel.vector_loads:
        dot = vector_loads.emit_dot(kernel, buffers, grad)
    else:
        dot = _emit_dot(kernel, buffers, x, grad)

    def over_corners(by_row: Sequence[Any], by_column: Sequence[Any], at: tuple[Any, ...]) -> Any:
        """Return the sum over the corners of a factor by row, one by column, and dot."""
        *group, p = at

        def row_sum(r: int) -> Any:
            first, second = (
                by_column[s][at] * dot[(*group, int64(r), int64(s), p)] for s in (0, 1)
            )
            return by_row[r][at] * (first + second)

        return row_sum(0) + row_sum(1)

    def along_axes(at: tuple[Any, ...]) -> tuple[Any, Any]:
        """Return the gradients of both offsets of a point."""
        if spec.softmax:
            factor = buffers.exp_logit[at] / buffers.exp_sum[at[:-1]]
        else:
            factor = kernel.mask_at(mask, at)
        scale = factor * kernel.constant(spec.offset_scale)
        along_x = scale * over_corners(rows.weights, columns.slopes, at)
        along_y = scale * over_corners(rows.slopes, columns.weights, at)
        return along_x, along_y  # x before y

    factor_grad = allocate("grad_mask", kernel.point_extents, kernel.dtype)
    # With vector loads, a thread computes all gradients of a point at once, and keeps only these.
    offset_grads = [
        allocate(f"grad_offset_{axis}", kernel.point_extents, kernel.dtype)
        for axis in ("xy" if kernel.vector_loads else "")
    ]
    with block("grad_mask", kernel.point_extents, "SSSSS") as at:
        place = tuple(at)
        T.buffer_store(factor_grad, over_corners(rows.weights, columns.weights, place), at)
        for offset_grad, element in zip(offset_grads, along_axes(place), strict=False):
            T.buffer_store(offset_grad, element, at)

    def offset_gradients(at: tuple[Any, ...]) -> Sequence[Any]:
        return [offset_grad[at] for offset_grad in offset_grads] or along_axes(at)

    _emit_results(kernel, buffers, factor_grad, offset_gradients, grad_offset, grad_mask)


def _emit_results(
    kernel: SamplingKernel,
    buffers: Buffers,
    factor_grad: Any,
    offset_gradients: Callable[[tuple[Any, ...]], Sequence[Any]],
    grad_offset: Any,
    grad_mask: Any,
) -> None:
    """Apply the gradient of the softmax, if any, and store the gradients."""
    spec = kernel.spec
    if spec.softmax:
        softmax_dot = compute(
            "softmax_dot",
            kernel.group_extents,
            lambda *at: buffers.exp_logit[at] * factor_grad[at],
            dtype=kernel.dtype,
            reduce=[kernel.point_extents[-1]],
        )
    with block("store", kernel.point_extents, "SSSSS") as at:
        n, y, x, g, p = place = tuple(at)
        value = factor_grad[place]
        if spec.softmax:
            total = buffers.exp_sum[n, y, x, g]
            value = buffers.exp_logit[place] / total * (value - softmax_dot[n, y, x, g] / total)
        point = g * int64(spec.points) + p
        T.buffer_store(grad_mask, tirx.Cast(grad_mask.dtype, value), [n, y, x, point])
        for axis, element in enumerate(offset_gradients(place)):
            channel = point * int64(2) + axis
            T.buffer_store(grad_offset, tirx.Cast(grad_offset.dtype, element), [n, y, x, channel])


class _AxisWeights(NamedTuple):
    """Bilinear weights of both pixels along an axis, and their slopes: each (N, Ho, Wo, G, P)."""

    weights: tuple[Any, Any]
    slopes: tuple[Any, Any]


def _emit_axis_weights(
    kernel: SamplingKernel, buffers: Buffers
) -> tuple[_AxisWeights, _AxisWeights]:
    """Compute the weights and slopes of rows and columns."""

    def allocate_pair(name: str) -> tuple[Any, Any]:
        first, second = (
            allocate(f"{name}_{r}", kernel.point_extents, kernel.dtype) for r in (0, 1)
        )
        return first, second

    rows, columns = (
        _AxisWeights(allocate_pair(f"weight_{axis}"), allocate_pair(f"slope_{axis}"))
        for axis in "yx"
    )
    with block("axis_weights", kernel.point_extents, "SSSSS") as at:
        place = tuple(at)
        for results, axis, position, first in (
            (rows, kernel.rows, buffers.position_y, buffers.row),
            (columns, kernel.columns, buffers.position_x, buffers.column),
        ):
            where = position[place], first[place]
            for corner in (0, 1):
                T.buffer_store(results.weights[corner], axis.weight(*where, int64(corner)), at)
                T.buffer_store(results.slopes[corner], axis.slope(*where, corner), at)
    return rows, columns


def _emit_dot(kernel: SamplingKernel, buffers: Buffers, x_tensor: Any, grad: Any) -> Any:
    """Compute the gradient times each pixel, over channels; (N, Ho, Wo, G, 2, 2, P)."""
    height, width = kernel.sizes.height, kernel.sizes.width
    *group, points = kernel.point_extents
    dot = allocate("dot", (*group, 2, 2, points), kernel.dtype)
    extents = (*kernel.point_extents, 2, 2, kernel.channel_extents[-1])
    with block("dot", extents, "SSSSSSSR") as (n, y, x, g, p, r, s, c):
        at = n, y, x, g, p
        row, column = patch_pixel(kernel, buffers, at, r, s)
        channel = kernel.channel(g, c)
        # The pixels read depend on data: declare the whole image.
        T.reads(
            grad[n, y, x, channel],
            buffers.index[at],
            x_tensor[n, 0:height, 0:width, channel],
        )
        T.writes(dot[n, y, x, g, r, s, p])
        with T.init():
            T.buffer_store(dot, kernel.constant(0), [n, y, x, g, r, s, p])
        pixel = kernel.cast(x_tensor[n, row, column, channel])
        term = kernel.cast(grad[n, y, x, channel]) * pixel
        T.buffer_store(dot, dot[n, y, x, g, r, s, p] + term, [n, y, x, g, r, s, p])
    return dot
