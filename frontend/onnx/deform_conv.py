"""Convert a ``DeformConv`` whose filters are all ones to DCNv3.

Both sample each point of each group and sum up. DeformConv numbers points by row, with y before x;
DCNv3 by column, with x before y. The permutation is folded into the linear layers that compute
offsets and mask, if there are any.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from dcnv3_tvm.errors import InvalidArgumentError
from dcnv3_tvm.frontend.onnx import dcnv3_node, forms
from dcnv3_tvm.frontend.onnx.graph import Replacement, constant_of, producer, replace_node
from dcnv3_tvm.spec import DCNv3Params


def convert(node: ir.Node) -> str | None:
    """Replace the node; return why it is no DCNv3, else None."""
    x, weight, offset, bias, mask = (*node.inputs, None, None)[:5]
    if x is None or offset is None or mask is None:
        return "it has no mask"
    filters, zeros = constant_of(weight), constant_of(bias)
    if filters is None or filters.ndim != 4 or filters.shape[1] != 1 or not np.all(filters == 1):
        return "its filters are not ones, one for each channel"
    if bias is not None and (zeros is None or np.any(zeros)):
        return "it has a bias"
    try:
        params = _params(node, filters.shape[2:])
    except (InvalidArgumentError, TypeError) as error:
        return str(error)
    tape = Replacement(node)
    height, width = params.kernel_size
    order = np.arange(height * width).reshape(height, width).T.reshape(-1)
    points = np.concatenate([group * height * width + order for group in range(params.group)])
    pairs = np.stack([2 * points + 1, 2 * points], axis=-1).reshape(-1)
    ones = np.ones(len(pairs))
    result = dcnv3_node.emit(
        tape,
        _channels_last(tape, x),
        forms.affine(tape, _channels_last(tape, offset), pairs.tolist(), ones, 0 * ones),
        forms.permute_mask(tape, _channels_last(tape, mask), points.tolist()),
        params,
    )
    replace_node(node, tape.channels_first(result), tape)
    return None


def _params(node: ir.Node, kernel: tuple[int, ...]) -> DCNv3Params:
    attributes = {name: attribute.value for name, attribute in node.attributes.items()}
    top, left, bottom, right = attributes.get("pads", (0, 0, 0, 0))
    if (top, left) != (bottom, right):
        raise InvalidArgumentError("its padding is not symmetric", got=attributes["pads"])
    return DCNv3Params(
        group=attributes.get("offset_group", 1),
        kernel_size=kernel,
        stride=attributes.get("strides", (1, 1)),
        pad=(top, left),
        dilation=attributes.get("dilations", (1, 1)),
    )


def _channels_last(tape: Replacement, value: ir.Value) -> ir.Value:
    """Return an NCHW value as NHWC: what it is a transpose of, or a transpose of it."""
    transpose = producer(value, "Transpose")
    if transpose is not None and list(transpose.attributes["perm"].value) == [0, 3, 1, 2]:
        source = transpose.inputs[0]
        assert source is not None
        return source
    return tape.channels_last(value)
