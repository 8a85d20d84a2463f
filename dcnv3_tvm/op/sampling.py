"""The blocks of a DCNv3 kernel, which schedules move.

For output pixel (n, ho, wo), group g and kernel point p of P, DCNv3 computes

    y[n, ho, wo, g, c] = sum_p mask[p] * bilinear(x[n, :, :, g, c], position[p])

in these blocks (`dcnv3_tvm.op.reference` states the formula in full):

========================= ========================================================================
block                     what it computes
========================= ========================================================================
softmax_max, _exp, _sum   with ``spec.softmax``: the stable softmax of the logits, not yet divided
softmax_shift, _share     the same without vector loads: logits minus the largest, 1 / sum
offsets                   without vector loads: the offsets along x, then those along y
coordinates               sampling position (y, x), relative to the anchor of the output pixel
corners                   row and column of the first of the four pixels read, inside the image
weights                   four bilinear weights, times the mask
pixels                    index of the first pixel
patch                     with vector loads: the four pixels, for each channel
sum                       weights times pixels over all points, for each channel
gate                      with the center feature: sigmoid of its logit, by group
center                    with the center feature and vector loads: the pixel of x
store                     division of the softmax, blend, and the one rounding to the output type
========================= ========================================================================

`dcnv3_tvm.op.coordinates` explains the coordinates and why no border needs a branch;
`dcnv3_tvm.op.scalar_loads` and `dcnv3_tvm.op.vector_loads` hold the two variants of the sum.
"""

from __future__ import annotations

from typing import Any

from tvm import tirx
from tvm.tirx.script import builder as T

from dcnv3_tvm.op import scalar_loads, vector_loads
from dcnv3_tvm.op.expr import int64
from dcnv3_tvm.op.prim_func_builder import block, compute
from dcnv3_tvm.op.sampling_kernel import Buffers, SamplingKernel


def emit_sampling(kernel: SamplingKernel, x: Any, offset: Any, mask: Any, out: Any) -> None:
    """Add all blocks of a kernel to the function that is being built.

    Parameters
    ----------
    kernel : SamplingKernel
        What to compute.
    x, offset, mask, out : buffer
        The function's arguments; offset and mask may be the same tensor.
    """
    buffers = Buffers.of(kernel)
    emit_points(kernel, buffers, offset, mask)
    emit_weights(kernel, buffers, mask)
    emit_index(kernel, buffers)
    if kernel.vector_loads:
        vector_loads.emit_patch(kernel, buffers, x)
        vector_loads.emit_sum(kernel, buffers)
    else:
        if kernel.spec.softmax:
            scalar_loads.emit_share(kernel, buffers)
        scalar_loads.emit_sum(kernel, buffers, x)
    if kernel.center_feature:
        _emit_gate(kernel, buffers, mask)
        if kernel.vector_loads:
            vector_loads.emit_center(kernel, buffers, x)
    _emit_store(kernel, buffers, x, out)


def emit_points(kernel: SamplingKernel, buffers: Buffers, offset: Any, mask: Any) -> None:
    """Compute the softmax of the mask, if any, sampling positions and first pixels."""
    if kernel.spec.softmax:
        _emit_softmax(kernel, buffers, mask)
    if not kernel.vector_loads:
        scalar_loads.emit_offsets(kernel, buffers, offset)
    _emit_coordinates(kernel, buffers, offset)
    _emit_corners(kernel, buffers)


def emit_index(kernel: SamplingKernel, buffers: Buffers) -> None:
    """Compute the index of the first pixel of each point."""
    if kernel.vector_loads:
        vector_loads.emit_vector_index(kernel, buffers)
    else:
        scalar_loads.emit_pixel_index(kernel, buffers)


def _emit_softmax(kernel: SamplingKernel, buffers: Buffers, mask: Any) -> None:
    """Compute the largest logit, the exponentials and their sum, for each group."""
    peak, groups, points = buffers.max_logit, kernel.group_extents, kernel.point_extents[-1]
    with block("softmax_max", kernel.point_extents, "SSSSR") as (*group, p):
        with T.init():
            T.buffer_store(peak, tirx.min_value(kernel.dtype), group)
        logit = kernel.mask_at(mask, (*group, p))
        T.buffer_store(peak, tirx.max(peak[tuple(group)], logit), group)
    shifted = None if kernel.vector_loads else scalar_loads.emit_shift(kernel, buffers, mask)

    def exponent(*at: Any) -> Any:
        return kernel.mask_at(mask, at) - peak[at[:-1]] if shifted is None else shifted[at]

    compute(
        "softmax_exp",
        kernel.point_extents,
        lambda *at: kernel.exp_of_nonpositive(exponent(*at)),
        dtype=kernel.dtype,
        into=buffers.exp_logit,
    )
    compute(
        "softmax_sum",
        groups,
        lambda *at: buffers.exp_logit[at],
        dtype=kernel.dtype,
        reduce=[points],
        into=buffers.exp_sum,
    )


def _emit_coordinates(kernel: SamplingKernel, buffers: Buffers, offset: Any) -> None:
    """Compute the sampling positions, relative to the anchors."""
    with block("coordinates", kernel.point_extents, "SSSSS") as at:
        n, y, x, g, p = at
        if kernel.vector_loads:
            along_x, along_y = (kernel.offset_at(offset, at, axis) for axis in (0, 1))
        else:
            along_x, along_y = (buffers.offset[n, y, x, axis, g, p] for axis in (0, 1))
        position_x = kernel.columns.position(p, along_x)
        position_y = kernel.rows.position(p, along_y)
        T.buffer_store(buffers.position_x, position_x, at)
        T.buffer_store(buffers.position_y, position_y, at)


def _emit_corners(kernel: SamplingKernel, buffers: Buffers) -> None:
    """Compute the first of the four pixels of each point, relative to the anchors."""
    with block("corners", kernel.point_extents, "SSSSS") as at:
        _, y, x, *_ = place = tuple(at)
        row = kernel.rows.first_pixel(buffers.position_y[place], y)
        column = kernel.columns.first_pixel(buffers.position_x[place], x)
        T.buffer_store(buffers.row, row, at)
        T.buffer_store(buffers.column, column, at)


def emit_weights(kernel: SamplingKernel, buffers: Buffers, mask: Any) -> None:
    """Compute the bilinear weights, times the mask or the exponential of its logit."""
    with block("weights", kernel.weight_extents, "SSSSSSS") as place:
        if kernel.vector_loads:
            n, y, x, g, r, s, p = place
        else:
            n, y, x, r, s, g, p = place
        at = n, y, x, g, p
        factor = buffers.exp_logit[at] if kernel.spec.softmax else kernel.mask_at(mask, at)
        weight_y = kernel.rows.weight(buffers.position_y[at], buffers.row[at], r)
        weight_x = kernel.columns.weight(buffers.position_x[at], buffers.column[at], s)
        # In this order, so that the product shared by both columns comes first.
        T.buffer_store(buffers.weight, factor * weight_y * weight_x, place)


def _emit_gate(kernel: SamplingKernel, buffers: Buffers, mask: Any) -> None:
    """Compute the sigmoid of the center feature's logits, which follow those of the mask."""
    start = int64(kernel.spec.group) * int64(kernel.spec.points)

    def gate(n: Any, y: Any, x: Any, g: Any) -> Any:
        logit = kernel.cast(mask[n, y, x, kernel.mask_start + start + g])
        one = kernel.constant(1)
        return one / (one + kernel.exp(-logit))

    compute("gate", kernel.group_extents, gate, dtype=kernel.dtype, into=buffers.gate)


def _emit_store(kernel: SamplingKernel, buffers: Buffers, x_tensor: Any, out: Any) -> None:
    def result(n: Any, y: Any, x: Any, g: Any, c: Any) -> Any:
        if kernel.vector_loads:
            value = buffers.total[n, y, x, g, c]
            if kernel.spec.softmax:
                # All channels share the reciprocal.
                value = value * (kernel.constant(1) / buffers.exp_sum[n, y, x, g])
        else:
            value = buffers.total[n, y, x, g, 0, c] + buffers.total[n, y, x, g, 1, c]
            if kernel.spec.softmax:
                value = value * buffers.share[n, y, x, g]
        if kernel.center_feature:
            source = x_tensor[n, y, x, kernel.channel(g, c)]
            center = kernel.cast(buffers.center[n, y, x, g, c] if kernel.vector_loads else source)
            value = value + buffers.gate[n, y, x, g] * (center - value)
        return tirx.Cast(out.dtype, value)

    compute(
        "store",
        kernel.channel_extents,
        result,
        dtype=out.dtype,
        into=out,
        at=lambda n, y, x, g, c: (n, y, x, kernel.channel(g, c)),
    )
