"""The forms in which DCNv3 is exported: nodes of standard operators, or of a plugin.

With ``s`` for stride, ``half = dilation * (kernel - 1) // 2`` and offsets in pixels, the point in
column i and row j of the kernel samples at ``(ox*s - pad + half) + offset_scale*(i*dilation - half
+ offset)`` in x, and likewise in y.

============== ================================================================================
form           nodes
============== ================================================================================
deform-conv    ``DeformConv`` with one filter of ones per channel (operator set 19)
grid-sample    ``GridSample``, ``Mul`` and ``ReduceSum``, at the fixed image size
plugin         ``mmdeploy::TRTDCNv3``, the published plugin for TensorRT
custom         ``dcnv3_tvm::DCNv3``, with a function in the model that expands it
============== ================================================================================
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Final

import numpy as np
import onnx_ir as ir

from dcnv3_tvm.errors import InvalidArgumentError
from dcnv3_tvm.frontend.onnx.graph import Array, Replacement, constant_of, producer, spatial_sizes
from dcnv3_tvm.frontend.onnx.sampling_points import kernel_grid, sampling_points
from dcnv3_tvm.spec import DCNv3Params

PLUGIN_DOMAIN: Final = "mmdeploy"
PLUGIN_OP: Final = "TRTDCNv3"

FOLDED: Final = ".folded"
"""Appended to the name of a weight that something is folded into."""

Form = Callable[[Replacement, ir.Value, ir.Value, ir.Value, DCNv3Params], ir.Value]
"""Emits the operator for x, offset and mask (weights, no logits), all channels-last."""


def deform_conv(
    tape: Replacement, x: ir.Value, offset: ir.Value, mask: ir.Value, params: DCNv3Params
) -> ir.Value:
    """Emit one ``DeformConv``; a removed center becomes a point of weight zero."""
    points = _row_major(params)
    # The removed center has weight zero, so that any offset will do.
    grid = (params.offset_scale - 1.0) * kernel_grid(params)[np.maximum(points, 0)]
    # DeformConv has for each group and point y before x; DCNv3 has x before y.
    index, shift = [], []
    for group in range(params.group):
        for place, (dx, dy) in zip(points, grid, strict=True):
            base = (group * params.points + max(place, 0)) * 2
            index += [base + 1, base]
            shift += [dy, dx]
    scale = np.full(len(index), params.offset_scale)
    moved = affine(tape, offset, index, scale, np.asarray(shift))
    if params.remove_center:
        mask = _with_center(tape, mask, params)
        points = [place if place >= 0 else params.points for place in points]
    total = params.points + int(params.remove_center)
    order = [group * total + place for group in range(params.group) for place in points]
    weights = permute_mask(tape, mask, order)
    channels = _channels(x)
    kernel_h, kernel_w = params.kernel_size
    arguments = [
        tape.channels_first(x),
        tape.constant(np.ones((channels, 1, kernel_h, kernel_w)), _dtype(x)),
        tape.channels_first(moved),
        None,
        tape.channels_first(weights),
    ]
    attributes = {
        "kernel_shape": params.kernel_size,
        "strides": params.stride,
        "pads": (*params.pad, *params.pad),
        "dilations": params.dilation,
        "group": channels,
        "offset_group": params.group,
    }
    return tape.channels_last(tape.op("DeformConv", arguments, attributes))


def grid_sample(
    tape: Replacement, x: ir.Value, offset: ir.Value, mask: ir.Value, params: DCNv3Params
) -> ir.Value:
    """Emit one ``GridSample`` for all groups and points, at the fixed size of x."""
    height, width = spatial_sizes(x)
    if not height or not width:
        raise InvalidArgumentError(
            "the form 'grid-sample' needs a fixed image size",
            got=f"a feature map of shape {x.shape}",
            hint="Export without dynamic_size, or in the form 'deform-conv'.",
        )
    out_height, out_width = (
        params.output_extent(size, axis) for axis, size in enumerate((height, width))
    )
    channels, group, points = _channels(x), params.group, params.points
    extent = np.array([width, height])
    fixed = (2 * sampling_points(params, (out_height, out_width)) + 1) / extent - 1
    scale = np.tile(2 * params.offset_scale / extent, group * points)
    moved = affine(tape, offset, range(group * points * 2), scale, np.zeros(len(scale)))
    pixels = out_height * out_width
    moved = tape.reshape(moved, [0, pixels, group, points * 2])
    base = tape.constant(fixed.reshape(1, pixels, 1, points * 2), _dtype(x))
    places = tape.op("Add", [moved, base])
    places = tape.op("Transpose", [places], {"perm": (0, 2, 1, 3)})
    places = tape.reshape(places, [-1, pixels, points, 2])
    maps = tape.reshape(tape.channels_first(x), [-1, channels // group, height, width])
    options = {"mode": "linear", "padding_mode": "zeros", "align_corners": 0}
    sampled = tape.op("GridSample", [maps, places], options)
    weights = tape.reshape(mask, [0, pixels, group, points])
    weights = tape.op("Transpose", [weights], {"perm": (0, 2, 1, 3)})
    weights = tape.reshape(weights, [-1, 1, pixels, points])
    axes = tape.constant([-1], "int64")
    total = tape.op("ReduceSum", [tape.op("Mul", [sampled, weights]), axes], {"keepdims": 0})
    total = tape.reshape(total, [-1, channels, out_height, out_width])
    return tape.channels_last(total)


def plugin(
    tape: Replacement, x: ir.Value, offset: ir.Value, mask: ir.Value, params: DCNv3Params
) -> ir.Value:
    """Emit the published plugin's node."""
    sizes = {
        f"{name}_{axis}": values[index]
        for name, values in (
            ("kernel", params.kernel_size),
            ("stride", params.stride),
            ("pad", params.pad),
            ("dilation", params.dilation),
        )
        for index, axis in enumerate("hw")
    }
    attributes: dict[str, Any] = sizes | {
        "group": params.group,
        "group_channels": _channels(x) // params.group,
        "offset_scale": params.offset_scale,
        "im2col_step": 256,
    }
    if params.remove_center:  # an attribute of the newer version only
        attributes["remove_center"] = 1
    return tape.op(PLUGIN_OP, [x, offset, mask], attributes, domain=PLUGIN_DOMAIN, version=1)


def emit(
    form: Form,
    tape: Replacement,
    x: ir.Value,
    offset: ir.Value,
    mask: ir.Value,
    params: DCNv3Params,
) -> ir.Value:
    """Emit the operator in a form, after its softmax if it has one."""
    if params.softmax:
        extents = spatial_sizes(mask)
        grouped = tape.reshape(mask, [0, *extents, params.group, params.points])
        weights = tape.op("Softmax", [grouped], {"axis": -1})
        mask = tape.reshape(weights, [0, *extents, params.mask_channels])
    return form(tape, x, offset, mask, dataclasses.replace(params, softmax=False))


def affine(
    tape: Replacement, value: ir.Value, index: Sequence[int], scale: Array, shift: Array
) -> ir.Value:
    """Emit ``value[..., index] * scale + shift``, folded into a linear layer before it."""
    linear = _linear(value)
    if linear is not None:
        source, weight, bias = linear
        columns = list(index)
        # As initializers under the names that they had: the old ones have no reader any more.
        product = tape.op(
            "MatMul", [source, _changed(tape, weight, lambda w: w[:, columns] * scale)]
        )
        return tape.op("Add", [product, _changed(tape, bias, lambda b: b[columns] * scale + shift)])
    if list(index) != list(range(len(index))):
        value = tape.op("Gather", [value, tape.constant(list(index), "int64")], {"axis": -1})
    if not np.all(scale == 1):
        value = tape.op("Mul", [value, tape.constant(scale, _dtype(value))])
    if np.any(shift):
        value = tape.op("Add", [value, tape.constant(shift, _dtype(value))])
    return value


def permute_mask(tape: Replacement, mask: ir.Value, index: list[int]) -> ir.Value:
    """Emit ``mask[..., index]``, before the softmax that computes the mask if there is one."""
    ones, zeros = np.ones(len(index)), np.zeros(len(index))
    last = producer(mask, "Reshape", only_use=True)
    softmax = producer(last.inputs[0], "Softmax", only_use=True) if last else None
    first = producer(softmax.inputs[0], "Reshape", only_use=True) if softmax else None
    if last is None or softmax is None or first is None or _linear(first.inputs[0]) is None:
        return affine(tape, mask, index, ones, zeros)
    logits = affine(tape, first.inputs[0], index, ones, zeros)
    grouped = tape.op("Reshape", [logits, first.inputs[1]], dict(first.attributes))
    weights = tape.op("Softmax", [grouped], dict(softmax.attributes))
    return tape.op("Reshape", [weights, last.inputs[1]], dict(last.attributes))


def _linear(value: ir.Value | None) -> tuple[ir.Value, ir.Value, ir.Value] | None:
    """Match ``source @ weight + bias`` with constants that are read once."""
    add = producer(value, "Add", only_use=True)
    if add is None:
        return None
    for product, bias in (tuple(add.inputs), tuple(reversed(add.inputs))):
        matmul = producer(product, "MatMul", only_use=True)
        if matmul is None or constant_of(bias) is None or bias is None:
            continue
        source, weight = matmul.inputs
        if source is not None and weight is not None and constant_of(weight) is not None:
            return source, weight, bias
    return None


def _changed(tape: Replacement, value: ir.Value, change: Callable[[Array], Array]) -> ir.Value:
    array = constant_of(value)
    assert array is not None
    result = change(array.astype("float64"))
    return tape.constant(result, array.dtype, f"{value.name}{FOLDED}")


def _with_center(tape: Replacement, mask: ir.Value, params: DCNv3Params) -> ir.Value:
    """Append a point of weight zero to each group."""
    extents = spatial_sizes(mask)
    grouped = tape.reshape(mask, [0, *extents, params.group, params.points])
    pads = tape.constant([0] * 9 + [1], "int64")
    padded = tape.op("Pad", [grouped, pads])
    return tape.reshape(padded, [0, *extents, params.group * (params.points + 1)])


def _row_major(params: DCNv3Params) -> list[int]:
    """Return for each kernel position, by rows, its number in DCNv3's order; -1 for none."""
    places = {point: number for number, point in enumerate(params.kernel_points)}
    height, width = params.kernel_size
    return [places.get((i, j), -1) for j in range(height) for i in range(width)]


def _channels(value: ir.Value) -> int:
    shape = () if value.shape is None else tuple(value.shape)
    if not shape or not isinstance(shape[-1], int):
        raise InvalidArgumentError("the channels of a feature map are unknown", got=value.name)
    return shape[-1]


def _dtype(value: ir.Value) -> Any:
    return (value.dtype or ir.DataType.FLOAT).numpy()
