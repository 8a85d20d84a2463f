"""Converters from nodes of an exported program to Relax, by the names of the nodes.

A converter emits its result through ``importer.block_builder``.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from typing import Any, Final

import numpy as np
import torch
from torch.fx import Node
from tvm import relax

from dcnv3_tvm.frontend.torch.nodes import arguments, constant, counted, dtype_of, refused, sizes
from dcnv3_tvm.frontend.torch.reduction_converters import REDUCTIONS
from dcnv3_tvm.frontend.torch.resize_converters import RESIZES
from dcnv3_tvm.op import relax_op


def _dcnv3(node: Node, importer: Any) -> relax.Var:
    values = arguments(node, importer)
    x, offset, mask = (values.pop(name) for name in ("x", "offset", "mask"))
    return importer.block_builder.emit(relax_op.dcnv3(x, offset, mask, **values))


def _batch_norm(node: Node, importer: Any) -> relax.Var:
    # TVM's own converter takes this node for one in training mode.
    given = arguments(node, importer)
    x, mean, variance = (given[name] for name in ("input", "running_mean", "running_var"))
    if given["training"] or mean is None or variance is None:
        raise refused(
            "a batch normalisation has no statistics of its own", node, "Call model.eval()."
        )
    channels = sizes(x)[1]
    result = relax.op.nn.batch_norm(
        x,
        _or_else(given["weight"], np.ones, (channels,)),
        _or_else(given["bias"], np.zeros, (channels,)),
        mean,
        variance,
        axis=1,
        epsilon=given["eps"],
        training=False,
    )
    return importer.block_builder.emit(relax.TupleGetItem(importer.block_builder.emit(result), 0))


def _layer_norm(node: Node, importer: Any) -> relax.Var:
    # TVM's own converter fails where there is no weight or no bias.
    given = arguments(node, importer)
    shape = given["normalized_shape"]
    result = relax.op.nn.layer_norm(
        given["input"],
        _or_else(given["weight"], np.ones, shape),
        _or_else(given["bias"], np.zeros, shape),
        axes=list(range(-len(shape), 0)),
        epsilon=given["eps"],
    )
    return importer.block_builder.emit(result)


def _or_else(
    weight: relax.Expr | None, filled: Callable[..., Any], shape: Sequence[int]
) -> relax.Expr:
    return constant(filled(shape)) if weight is None else weight


def _pixel_shuffle(node: Node, importer: Any) -> relax.Var:
    # TVM has the operator, and no kernel to legalise it to.
    given = arguments(node, importer)
    x, factor = given["self"], given["upscale_factor"]
    batch, channels, height, width = x.ty.shape.values
    outer = channels // (factor * factor)
    parts = relax.op.reshape(x, (batch, outer, factor, factor, height, width))
    woven = relax.op.permute_dims(parts, [0, 1, 4, 2, 5, 3])
    result = relax.op.reshape(woven, (batch, outer, height * factor, width * factor))
    return importer.block_builder.emit(result)


def _cast(node: Node, importer: Any) -> relax.Var:
    # TVM's own converter keeps casts to the type that a tensor has already.
    given = arguments(node, importer)
    x, name = given["self"], str(given["dtype"]).removeprefix("torch.")
    if dtype_of(x) == name:
        return x
    return importer.block_builder.emit(relax.op.astype(x, name))


def _repeat_interleave(node: Node, importer: Any) -> relax.Var:
    # TVM has no converter, and for one such node the whole program would be decomposed.
    given = arguments(node, importer)
    x, repeats, dim = (given[name] for name in ("self", "repeats", "dim"))
    emit = importer.block_builder.emit
    if dim is None:
        x, dim = emit(relax.op.reshape(x, (-1,))), 0
    axis = dim % x.ty.ndim
    before, (size, *after) = list(x.ty.shape.values[:axis]), x.ty.shape.values[axis:]
    apart = emit(relax.op.expand_dims(x, axis + 1))
    repeated = emit(relax.op.broadcast_to(apart, [*before, size, repeats, *after]))
    return emit(relax.op.reshape(repeated, [*before, size * repeats, *after]))


def _rsub(node: Node, importer: Any) -> relax.Var:
    # TVM's own converter makes an integer of the 1 in `1 - gate`.
    given = arguments(node, importer)
    x, alpha, dtype = given["self"], given["alpha"], dtype_of(given["self"])
    scaled = x if alpha == 1 else relax.op.multiply(x, constant(alpha, dtype))
    result = relax.op.subtract(constant(given["other"], dtype), scaled)
    return importer.block_builder.emit(result)


def _clip(low: str, high: str) -> Callable[[Node, Any], relax.Var]:
    # TVM's own converters of hardtanh and clamp_max leave the bounds out.
    def converter(node: Node, importer: Any) -> relax.Var:
        given = arguments(node, importer)
        bounds = given.get(low, -math.inf), given.get(high, math.inf)
        return importer.block_builder.emit(relax.op.clip(given["self"], *bounds))

    return converter


def _elu(node: Node, importer: Any) -> relax.Var:
    # TVM's own converters know one of the three scales.
    given = arguments(node, importer)
    x, dtype = given["self"], dtype_of(given["self"])
    alpha, scale = constant(given["alpha"], dtype), constant(given.get("scale", 1), dtype)
    # CELU, which has two of them, is scaled inside by the inverse.
    inner = constant(given["input_scale"] if "input_scale" in given else 1 / given["alpha"], dtype)
    # Of what is not positive alone: an exponential of the rest might be infinite.
    least = relax.op.minimum(x, constant(0, dtype))
    exponential = relax.op.exp(relax.op.multiply(least, inner))
    below = relax.op.multiply(relax.op.subtract(exponential, constant(1, dtype)), alpha)
    result = relax.op.multiply(relax.op.add(relax.op.nn.relu(x), below), scale)
    return importer.block_builder.emit(result)


def _scaled_sum(
    relax_operator: Callable[..., relax.Expr], of_numbers: Callable[..., Any]
) -> Callable[[Node, Any], relax.Var]:
    # TVM's own converters take no notice of the factor.
    def converter(node: Node, importer: Any) -> relax.Var:
        given = arguments(node, importer)
        factor = given["alpha"]
        if factor == 1:
            return importer._binary_op(relax_operator, of_numbers)(node)
        x, other = given["self"], given["other"]
        if isinstance(other, relax.Expr):
            other = relax.op.multiply(other, constant(factor, dtype_of(other)))
        else:
            other = constant(other * factor, dtype_of(x))
        return importer.block_builder.emit(relax_operator(x, other))

    return converter


def _average_pool(node: Node, importer: Any) -> relax.Var:
    # TVM's own converter takes no notice of the divisor.
    if arguments(node, importer)["divisor_override"] is not None:
        raise refused("avg_pool2d with a divisor_override", node, "Multiply its result.")
    return importer._avg_pool2d(node)


def _group_norm(node: Node, importer: Any) -> relax.Var:
    # TVM's own converter fails where there is no weight or no bias.
    groups = arguments(node, importer)["num_groups"]
    return _norm_of_pixels(node, importer, relax.op.nn.group_norm, num_groups=groups)


def _instance_norm(node: Node, importer: Any) -> relax.Var:
    # TVM's own converter takes another argument for the epsilon.
    if not arguments(node, importer)["use_input_stats"]:
        raise refused("instance_norm with statistics of training", node, "Use a BatchNorm.")
    return _norm_of_pixels(node, importer, relax.op.nn.instance_norm)


def _norm_of_pixels(
    node: Node, importer: Any, norm: Callable[..., relax.Expr], **options: Any
) -> relax.Var:
    given = arguments(node, importer)
    x = given["input"]
    channels = sizes(x)[1]
    result = norm(
        x,
        _or_else(given["weight"], np.ones, (channels,)),
        _or_else(given["bias"], np.zeros, (channels,)),
        channel_axis=1,
        axes=list(range(2, x.ty.ndim)),
        epsilon=given["eps"],
        **options,
    )
    return importer.block_builder.emit(result)


def _select(node: Node, importer: Any) -> relax.Var:
    # TVM's own converter reads outside of the tensor where the index counts from the end.
    given = arguments(node, importer)
    x, dim, index = given["self"], given["dim"], given["index"]
    size = sizes(x)[dim]
    if isinstance(index, int) and index < 0:
        place = relax.op.add(counted(size, importer, "int64"), constant(index + 1, "int64"))
        place = constant(size + index, "int64") if isinstance(size, int) else place
    else:
        place = constant(index, "int64")
    return importer.block_builder.emit(relax.op.take(x, place, axis=dim, mode="clip"))


def _grid_sample(node: Node, importer: Any) -> relax.Var:
    # TVM's own converter leaves the coordinates last, where its operator wants them second.
    given = arguments(node, importer)
    result = relax.op.image.grid_sample(
        given["input"],
        relax.op.permute_dims(given["grid"], [0, 3, 1, 2]),
        method=("bilinear", "nearest", "bicubic")[given["interpolation_mode"]],
        layout="NCHW",
        padding_mode=("zeros", "border", "reflection")[given["padding_mode"]],
        align_corners=given["align_corners"],
    )
    return importer.block_builder.emit(result)


def _pad(node: Node, importer: Any) -> relax.Var:
    # TVM pads by numbers only.
    given = arguments(node, importer)
    if not all(isinstance(width, int) for width in given["pad"]):
        raise refused(
            "a padding whose width depends on an open size",
            node,
            "Pad the image before it goes into the model, or import with fixed sizes.",
        )
    own = importer._pad if "mode" in given else importer._constant_pad_nd
    return own(node)


def _linspace(node: Node, importer: Any) -> relax.Expr:
    # TVM's own converter adds up steps that are rounded.
    given = arguments(node, importer)
    dtype = given["dtype"] or torch.get_default_dtype()
    numbers = torch.linspace(given["start"], given["end"], given["steps"], dtype=dtype)
    return constant(numbers.numpy(), str(dtype).removeprefix("torch."))


def _roll(node: Node, importer: Any) -> relax.Var:
    # TVM's own converter takes no open sizes.
    given = arguments(node, importer)
    x, dims = given["self"], given["dims"]
    shape = sizes(x)
    if not dims:
        x, dims = relax.op.reshape(x, (-1,)), [0]
    for shift, dim in zip(given["shifts"], dims, strict=True):
        size = math.prod(shape) if not given["dims"] else shape[dim]
        count = relax.op.add(counted(size, importer, "int64"), constant(1, "int64"))
        places = relax.op.subtract(relax.op.arange(0, size, 1, "int64"), constant(shift, "int64"))
        places = importer.block_builder.emit(relax.op.floor_mod(places, count))
        x = importer.block_builder.emit(relax.op.take(x, places, axis=dim, mode="clip"))
    return importer.block_builder.emit(relax.op.reshape(x, shape))


def _unfold(node: Node, importer: Any) -> relax.Var:
    # TVM has no converter. A convolution whose filters pick one pixel of a window each.
    given = arguments(node, importer)
    x, window = given["self"], given["kernel_size"]
    batch, channels, *_ = sizes(x)
    picked = np.eye(math.prod(window)).reshape(-1, 1, *window)
    windows = importer.block_builder.emit(
        relax.op.nn.conv2d(
            x,
            constant(np.tile(picked, (channels, 1, 1, 1))),
            strides=given["stride"],
            padding=given["padding"],
            dilation=given["dilation"],
            groups=channels,
        )
    )
    columns = channels * math.prod(window)
    return importer.block_builder.emit(
        relax.op.reshape(windows, (batch, columns, math.prod(sizes(windows)[2:])))
    )


def _attention(node: Node, importer: Any) -> relax.Var:
    # TVM's own converter takes no notice of the scale, and its operator takes no open sizes.
    given = arguments(node, importer)
    query, key, value = given["query"], given["key"], given["value"]
    if given["enable_gqa"] or given["dropout_p"]:
        raise refused("attention with dropout or shared heads", node, "Write it out.")
    dtype = dtype_of(query)
    scale = given["scale"] or 1 / math.sqrt(sizes(query)[-1])
    swapped = [*range(query.ty.ndim - 2), -1, -2]
    scores = relax.op.matmul(
        relax.op.multiply(query, constant(scale, dtype)), relax.op.permute_dims(key, swapped)
    )
    mask = given["attn_mask"]
    if given["is_causal"]:
        rows, columns = (relax.op.arange(0, sizes(each)[-2], 1, "int64") for each in (query, key))
        mask = relax.op.less_equal(columns, relax.op.expand_dims(rows, 1))
    if mask is not None:
        mask = importer.block_builder.emit(mask)
        if dtype_of(mask) == "bool":
            scores = relax.op.where(mask, scores, constant(-math.inf, dtype))
        else:
            scores = relax.op.add(scores, mask)
    weights = relax.op.nn.softmax(scores, -1)
    return importer.block_builder.emit(relax.op.matmul(weights, value))


CONVERTERS: Final[dict[str, Callable[[Node, Any], relax.Var]]] = {
    "dcnv3.default": _dcnv3,
    "batch_norm.default": _batch_norm,
    "add.Scalar": _scaled_sum(relax.op.add, operator.add),
    "add.Tensor": _scaled_sum(relax.op.add, operator.add),
    "avg_pool2d.default": _average_pool,
    "celu.default": _elu,
    "clamp_max.default": _clip("", "max"),
    "constant_pad_nd.default": _pad,
    "elu.default": _elu,
    "grid_sampler_2d.default": _grid_sample,
    "group_norm.default": _group_norm,
    "hardtanh.default": _clip("min_val", "max_val"),
    "im2col.default": _unfold,
    "instance_norm.default": _instance_norm,
    "layer_norm.default": _layer_norm,
    "linspace.default": _linspace,
    "pad.default": _pad,
    "pixel_shuffle.default": _pixel_shuffle,
    "repeat_interleave.self_int": _repeat_interleave,
    "roll.default": _roll,
    "rsub.Scalar": _rsub,
    "scaled_dot_product_attention.default": _attention,
    "select.int": _select,
    "sub.Scalar": _scaled_sum(relax.op.subtract, operator.sub),
    "sub.Tensor": _scaled_sum(relax.op.subtract, operator.sub),
    "to.dtype": _cast,
    **REDUCTIONS,
    **RESIZES,
}
"""By node name. All but the first stand in for converters of TVM that are wrong or missing."""
