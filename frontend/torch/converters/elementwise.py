"""Converters of element-wise operators and constants."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any, Final

import torch
from torch.fx import Node
from tvm import relax

from dcnv3_tvm.frontend.torch.fx_nodes import constant, node_arguments, operand, size_tensor
from dcnv3_tvm.runtime.tensors import dtype_of
from dcnv3_tvm.transform.ir import dimensions, element_type


def _cast(node: Node, importer: Any) -> relax.Var:
    # TVM's converter keeps casts to the type that a tensor already has.
    args = node_arguments(node, importer)
    x, dtype = args["self"], str(args["dtype"]).removeprefix("torch.")
    if element_type(x) == dtype:
        return x
    return importer.block_builder.emit(relax.op.astype(x, dtype))


def _rsub(node: Node, importer: Any) -> relax.Var:
    # TVM's converter turns the 1 in `1 - gate` into an integer tensor, and ignores alpha.
    args = node_arguments(node, importer)
    x, other, alpha, dtype = args["self"], args["other"], args["alpha"], element_type(args["self"])
    scaled = x if alpha == 1 else relax.op.multiply(x, constant(alpha, dtype))
    result = relax.op.subtract(operand(other, dtype), scaled)
    return importer.block_builder.emit(result)


def _divide_and_round(node: Node, importer: Any) -> relax.Var:
    # TVM's converter takes the type of a number from Python, and truncates integers as floats.
    args = node_arguments(node, importer)
    x, dtype = args["self"], element_type(args["self"])
    other = operand(args["other"], dtype)
    if args["rounding_mode"] == "floor":
        result = relax.op.floor_divide(x, other)
    else:
        result = relax.op.divide(x, other)
        if dtype.startswith("float") and args["rounding_mode"] == "trunc":
            result = relax.op.trunc(result)
    return importer.block_builder.emit(result)


def _power(node: Node, importer: Any) -> relax.Var:
    # TVM has no kernel for powers of integers. Those below 2^53 are exact in float64.
    args = node_arguments(node, importer)
    dtype = dtype_of(node.meta["val"])
    computed = dtype if "float" in dtype else "float64"
    base, exponent = (
        relax.op.astype(each, computed)
        if isinstance(each, relax.Expr)
        else constant(each, computed)
        for each in (args["self"], args["exponent"])
    )
    result = importer.block_builder.emit(relax.op.power(base, exponent))
    if computed == dtype:
        return result
    return importer.block_builder.emit(relax.op.astype(relax.op.round(result), dtype))


def _log_add_exp(node: Node, importer: Any) -> relax.Var:
    # The exponentials of TVM's operator overflow.
    args = node_arguments(node, importer)
    a, b = args["self"], args["other"]
    distance = relax.op.abs(relax.op.subtract(a, b))
    smaller = relax.op.exp(relax.op.negative(distance))
    rest = relax.op.log(relax.op.add(constant(1, element_type(a)), smaller))
    return importer.block_builder.emit(relax.op.add(relax.op.maximum(a, b), rest))


def _masked_fill(node: Node, importer: Any) -> relax.Var:
    # TVM cannot compile its converter's result for infinite values.
    args = node_arguments(node, importer)
    value = constant(args["value"], element_type(args["self"]))
    return importer.block_builder.emit(relax.op.where(args["mask"], value, args["self"]))


def _full(node: Node, importer: Any) -> relax.Var:
    # TVM cannot compile its converters' results for infinite values.
    args = node_arguments(node, importer)
    value = args["fill_value"]
    if not isinstance(value, float) or math.isfinite(value):
        return importer._full(node) if "size" in args else importer._full_like(node)
    shape = args["size"] if "size" in args else dimensions(args["self"])
    filled = constant(value, dtype_of(node.meta["val"]))
    return importer.block_builder.emit(relax.op.broadcast_to(filled, shape))


def _scalar_tensor(node: Node, importer: Any) -> relax.Expr:
    # TVM's converter does not support sizes.
    args = node_arguments(node, importer)
    value, dtype = args["s"], dtype_of(node.meta["val"])
    if isinstance(value, int | float):
        return constant(value, dtype)
    return size_tensor(value, importer, dtype)


def _matmul(node: Node, importer: Any) -> relax.Var:
    # TVM's converters return float32 for every type.
    return importer.block_builder.emit(relax.op.matmul(*importer.retrieve_args(node)))


def _scaled_sum(
    relax_operator: Callable[..., relax.Expr], scalar_operator: Callable[..., Any]
) -> Callable[[Node, Any], relax.Var]:
    """Convert ``self + alpha * other`` or ``self - alpha * other``."""

    # TVM's converters ignore alpha.
    def converter(node: Node, importer: Any) -> relax.Var:
        args = node_arguments(node, importer)
        alpha = args["alpha"]
        if alpha == 1:
            return importer._binary_op(relax_operator, scalar_operator)(node)
        x, other = args["self"], args["other"]
        if isinstance(other, relax.Expr):
            other = relax.op.multiply(other, constant(alpha, element_type(other)))
        else:
            other = constant(other * alpha, element_type(x))
        return importer.block_builder.emit(relax_operator(x, other))

    return converter


def _clip(low: str | None, high: str | None) -> Callable[[Node, Any], relax.Var]:
    """Convert a clamp whose bounds are the arguments named `low` and `high`."""

    # TVM's converters drop bounds of hardtanh and clamp_max, and clip integers to infinity.
    def converter(node: Node, importer: Any) -> relax.Var:
        args = node_arguments(node, importer)
        x, dtype = args["self"], element_type(args["self"])
        minimum, maximum = (None if name is None else args[name] for name in (low, high))
        if "float" in dtype and not any(isinstance(b, relax.Expr) for b in (minimum, maximum)):
            minimum = -math.inf if minimum is None else minimum
            maximum = math.inf if maximum is None else maximum
            return importer.block_builder.emit(relax.op.clip(x, minimum, maximum))
        for bound, limit in ((minimum, relax.op.maximum), (maximum, relax.op.minimum)):
            if bound is not None:
                x = importer.block_builder.emit(limit(x, operand(bound, dtype)))
        return x

    return converter


def _elu(node: Node, importer: Any) -> relax.Var:
    # TVM's converters support only one of alpha, scale and input_scale.
    args = node_arguments(node, importer)
    x, dtype = args["self"], element_type(args["self"])
    alpha, scale = constant(args["alpha"], dtype), constant(args.get("scale", 1), dtype)
    # CELU has no input_scale: it divides its input by alpha.
    input_scale = args["input_scale"] if "input_scale" in args else 1 / args["alpha"]
    # The exponential of a large positive input would be infinite.
    negative = relax.op.minimum(x, constant(0, dtype))
    exponential = relax.op.exp(relax.op.multiply(negative, constant(input_scale, dtype)))
    below = relax.op.multiply(relax.op.subtract(exponential, constant(1, dtype)), alpha)
    result = relax.op.multiply(relax.op.add(relax.op.nn.relu(x), below), scale)
    return importer.block_builder.emit(result)


def _linspace(node: Node, importer: Any) -> relax.Expr:
    # TVM's converter accumulates rounded steps.
    args = node_arguments(node, importer)
    dtype = args["dtype"] or torch.get_default_dtype()
    values = torch.linspace(args["start"], args["end"], args["steps"], dtype=dtype)
    return constant(values.numpy(), str(dtype).removeprefix("torch."))


ELEMENTWISE: Final[dict[str, Callable[[Node, Any], relax.Var]]] = {
    "add.Scalar": _scaled_sum(relax.op.add, operator.add),
    "add.Tensor": _scaled_sum(relax.op.add, operator.add),
    "bmm.default": _matmul,
    "celu.default": _elu,
    "clamp.Tensor": _clip(low="min", high="max"),
    "clamp.default": _clip(low="min", high="max"),
    "clamp_max.default": _clip(low=None, high="max"),
    "clamp_min.default": _clip(low="min", high=None),
    "div.Tensor_mode": _divide_and_round,
    "elu.default": _elu,
    "full.default": _full,
    "full_like.default": _full,
    "hardtanh.default": _clip(low="min_val", high="max_val"),
    "linspace.default": _linspace,
    "logaddexp.default": _log_add_exp,
    "masked_fill.Scalar": _masked_fill,
    "matmul.default": _matmul,
    "mm.default": _matmul,
    "pow.Scalar": _power,
    "pow.Tensor_Scalar": _power,
    "pow.Tensor_Tensor": _power,
    "rsub.Scalar": _rsub,
    "rsub.Tensor": _rsub,
    "scalar_tensor.default": _scalar_tensor,
    "sub.Scalar": _scaled_sum(relax.op.subtract, operator.sub),
    "sub.Tensor": _scaled_sum(relax.op.subtract, operator.sub),
    "to.dtype": _cast,
}
