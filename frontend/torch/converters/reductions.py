"""Converters of reductions."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Final

from torch.fx import Node
from tvm import relax

from dcnv3_tvm.frontend.torch.fx_nodes import (
    constant,
    node_arguments,
    reduction_axes,
    size_minus_one,
)
from dcnv3_tvm.runtime.tensors import dtype_of
from dcnv3_tvm.transform.ir import dimensions, element_type


def _reduction(relax_operator: Callable[..., relax.Expr]) -> Callable[[Node, Any], relax.Var]:
    def converter(node: Node, importer: Any) -> relax.Var:
        args = node_arguments(node, importer)
        x, dtype = args["self"], args.get("dtype")
        if dtype is not None:
            x = relax.op.astype(x, str(dtype).removeprefix("torch."))
        axes = reduction_axes(args["self"], args["dim"])
        return importer.block_builder.emit(relax_operator(x, axes, keepdims=args["keepdim"]))

    return converter


def _extremum(
    value: Callable[..., relax.Expr], index: Callable[..., relax.Expr]
) -> Callable[[Node, Any], relax.Var]:
    """Convert ``max`` or ``min`` along an axis, which returns values and indices."""

    # TVM's converter of max sorts, for which there is no kernel; min has no converter.
    def converter(node: Node, importer: Any) -> relax.Var:
        args = node_arguments(node, importer)
        (axis,) = reduction_axes(args["self"], args["dim"])
        results = [
            importer.block_builder.emit(reduce(args["self"], axis, keepdims=args["keepdim"]))
            for reduce in (value, index)
        ]
        return importer.block_builder.emit(relax.Tuple(results))

    return converter


def _count_nonzero(node: Node, importer: Any) -> relax.Var:
    # TVM has no converter, nor one for PyTorch's decomposition of it on boolean tensors.
    args = node_arguments(node, importer)
    x = args["self"]
    if element_type(x) != "bool":
        x = relax.op.not_equal(x, constant(0, element_type(x)))
    ones = importer.block_builder.emit(relax.op.astype(x, "int64"))
    return importer.block_builder.emit(relax.op.sum(ones, reduction_axes(ones, args.get("dim"))))


def _any(node: Node, importer: Any) -> relax.Var:
    # TVM has no converter for all axes.
    x = node_arguments(node, importer)["self"]
    truth = relax.op.astype(relax.op.astype(x, "bool"), "int8")
    return importer.block_builder.emit(relax.op.astype(relax.op.max(truth), "bool"))


def _cumulative_sum(node: Node, importer: Any) -> relax.Var:
    # TVM lowers it to a call of its library, which artifacts do not have.
    args = node_arguments(node, importer)
    dtype = dtype_of(node.meta["val"])
    x, (axis,) = relax.op.astype(args["self"], dtype), reduction_axes(args["self"], args["dim"])
    positions = relax.op.arange(0, dimensions(args["self"])[axis], 1, "int64")
    after = list(range(2, args["self"].ty.ndim - axis + 1))
    is_added = relax.op.less_equal(
        relax.op.expand_dims(positions, [0, *after]), relax.op.expand_dims(positions, [1, *after])
    )
    terms = relax.op.where(is_added, relax.op.expand_dims(x, axis), constant(0, dtype))
    sums = relax.op.sum(terms, axis + 1)
    # TVM cannot tell that the length of the range is the dynamic size it was made of.
    return importer.block_builder.emit(relax.op.reshape(sums, dimensions(args["self"])))


def _variance(node: Node, importer: Any) -> relax.Var:
    # TVM's converter of the standard deviation ignores the correction.
    args = node_arguments(node, importer)
    x, dtype = args["self"], element_type(args["self"])
    axes = reduction_axes(x, args.get("dim"))
    correction = args.get("correction")
    if correction is None:
        correction = int(args.get("unbiased", True))
    biased = relax.op.variance(x, axes, keepdims=args.get("keepdim", False))
    if correction == 0:
        return importer.block_builder.emit(biased)
    # variance * count / max(count - correction, 0), as PyTorch computes it.
    count = math.prod(dimensions(x)[axis] for axis in axes)
    if isinstance(count, int):
        divisor = max(count - correction, 0)
        factor = constant(count / divisor if divisor else math.inf, dtype)
    else:
        last = size_minus_one(count, importer, dtype)
        divisor = relax.op.maximum(
            relax.op.subtract(last, constant(correction - 1, dtype)), constant(0, dtype)
        )
        factor = relax.op.divide(relax.op.add(last, constant(1, dtype)), divisor)
    return importer.block_builder.emit(relax.op.multiply(biased, factor))


def _standard_deviation(node: Node, importer: Any) -> relax.Var:
    return importer.block_builder.emit(relax.op.sqrt(_variance(node, importer)))


def _with_mean(spread: Callable[[Node, Any], relax.Var]) -> Callable[[Node, Any], relax.Var]:
    """Convert ``var_mean`` or ``std_mean``, which return two tensors."""

    def converter(node: Node, importer: Any) -> relax.Var:
        args = node_arguments(node, importer)
        axes = reduction_axes(args["self"], args.get("dim"))
        mean = relax.op.mean(args["self"], axes, keepdims=args.get("keepdim", False))
        results = [spread(node, importer), importer.block_builder.emit(mean)]
        return importer.block_builder.emit(relax.Tuple(results))

    return converter


REDUCTIONS: Final[dict[str, Callable[[Node, Any], relax.Var]]] = {
    "amax.default": _reduction(relax.op.max),
    "amin.default": _reduction(relax.op.min),
    "any.default": _any,
    "count_nonzero.default": _count_nonzero,
    "count_nonzero.dim_IntList": _count_nonzero,
    "cumsum.default": _cumulative_sum,
    "max.dim": _extremum(relax.op.max, relax.op.argmax),
    "min.dim": _extremum(relax.op.min, relax.op.argmin),
    "prod.dim_int": _reduction(relax.op.prod),
    **{
        f"{name}.{overload}": converter
        for name, converter in (
            ("var", _variance),
            ("std", _standard_deviation),
            ("var_mean", _with_mean(_variance)),
            ("std_mean", _with_mean(_standard_deviation)),
        )
        for overload in ("default", "dim", "correction")
    },
}
