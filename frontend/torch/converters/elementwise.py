"""Converters of element-wise operators and constants."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any, Final

import torch
from torch.fx import Node
from tvm import relax

from dcnv3_tvm.frontend.torch.fx_nodes import constant, node_arguments
from dcnv3_tvm.transform.ir import element_type


def _cast(node: Node, importer: Any) -> relax.Var:
    # TVM's converter keeps casts to the type that a tensor already has.
    args = node_arguments(node, importer)
    x, dtype = args["self"], str(args["dtype"]).removeprefix("torch.")
    if element_type(x) == dtype:
        return x
    return importer.block_builder.emit(relax.op.astype(x, dtype))


def _rsub(node: Node, importer: Any) -> relax.Var:
    # TVM's converter turns the 1 in `1 - gate` into an integer tensor.
    args = node_arguments(node, importer)
    x, alpha, dtype = args["self"], args["alpha"], element_type(args["self"])
    scaled = x if alpha == 1 else relax.op.multiply(x, constant(alpha, dtype))
    result = relax.op.subtract(constant(args["other"], dtype), scaled)
    return importer.block_builder.emit(result)


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

    # TVM's converters of hardtanh and clamp_max drop the bounds.
    def converter(node: Node, importer: Any) -> relax.Var:
        args = node_arguments(node, importer)
        minimum = -math.inf if low is None else args[low]
        maximum = math.inf if high is None else args[high]
        return importer.block_builder.emit(relax.op.clip(args["self"], minimum, maximum))

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
    "celu.default": _elu,
    "clamp_max.default": _clip(low=None, high="max"),
    "elu.default": _elu,
    "hardtanh.default": _clip(low="min_val", high="max_val"),
    "linspace.default": _linspace,
    "rsub.Scalar": _rsub,
    "sub.Scalar": _scaled_sum(relax.op.subtract, operator.sub),
    "sub.Tensor": _scaled_sum(relax.op.subtract, operator.sub),
    "to.dtype": _cast,
}
