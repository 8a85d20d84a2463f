"""Converters of reductions, by the names of their nodes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Final

from torch.fx import Node
from tvm import relax

from dcnv3_tvm.frontend.torch.nodes import (
    arguments,
    axes_of,
    constant,
    counted,
    dtype_of,
    refused,
    sizes,
    uses_result,
)


def _reduced(operator: Callable[..., relax.Expr]) -> Callable[[Node, Any], relax.Var]:
    def converter(node: Node, importer: Any) -> relax.Var:
        given = arguments(node, importer)
        x, dtype = given["self"], given.get("dtype")
        if dtype is not None:
            x = relax.op.astype(x, str(dtype).removeprefix("torch."))
        axes = axes_of(given["self"], given["dim"])
        return importer.block_builder.emit(operator(x, axes, keepdims=given["keepdim"]))

    return converter


def _extremum(
    value: Callable[..., relax.Expr], position: Callable[..., relax.Expr]
) -> Callable[[Node, Any], relax.Var]:
    # TVM's own converter sorts, for which there is no kernel, and it has none for the minimum.
    def converter(node: Node, importer: Any) -> relax.Var:
        given = arguments(node, importer)
        (axis,) = axes_of(given["self"], given["dim"])
        results = [
            importer.block_builder.emit(operator(given["self"], axis, keepdims=given["keepdim"]))
            for operator in (value, position)
        ]
        return importer.block_builder.emit(relax.Tuple(results))

    return converter


def _count_nonzero(node: Node, importer: Any) -> relax.Var:
    # TVM has no converter, and none for what PyTorch decomposes it to where the tensor is boolean.
    given = arguments(node, importer)
    x = given["self"]
    if dtype_of(x) != "bool":
        x = relax.op.not_equal(x, constant(0, dtype_of(x)))
    ones = importer.block_builder.emit(relax.op.astype(x, "int64"))
    return importer.block_builder.emit(relax.op.sum(ones, axes_of(ones, given.get("dim"))))


def _variance(node: Node, importer: Any) -> relax.Var:
    # TVM's own converter of the standard deviation takes no notice of the correction.
    given = arguments(node, importer)
    x = given["self"]
    axes = axes_of(x, given.get("dim"))
    correction = given.get("correction")
    if correction is None:
        correction = int(given.get("unbiased", True))
    biased = relax.op.variance(x, axes, keepdims=given.get("keepdim", False))
    if correction == 0:
        return importer.block_builder.emit(biased)
    count = math.prod(sizes(x)[axis] for axis in axes)
    if isinstance(count, int):
        left = max(count - correction, 0)
        factor = constant(count / left if left else math.inf, dtype_of(x))
    else:
        less_one = counted(count, importer, dtype_of(x))
        one, rest = constant(1, dtype_of(x)), constant(correction - 1, dtype_of(x))
        left = relax.op.maximum(relax.op.subtract(less_one, rest), constant(0, dtype_of(x)))
        factor = relax.op.divide(relax.op.add(less_one, one), left)
    return importer.block_builder.emit(relax.op.multiply(biased, factor))


def _deviation(node: Node, importer: Any) -> relax.Var:
    return importer.block_builder.emit(relax.op.sqrt(_variance(node, importer)))


def _with_mean(
    first: Callable[[Node, Any], relax.Var],
) -> Callable[[Node, Any], relax.Var]:
    def converter(node: Node, importer: Any) -> relax.Var:
        given = arguments(node, importer)
        axes = axes_of(given["self"], given.get("dim"))
        mean = relax.op.mean(given["self"], axes, keepdims=given.get("keepdim", False))
        results = [first(node, importer), importer.block_builder.emit(mean)]
        return importer.block_builder.emit(relax.Tuple(results))

    return converter


def _adaptive_max_pool(node: Node, importer: Any) -> relax.Var:
    given = arguments(node, importer)
    x, wanted = given["self"], list(given["output_size"])
    if uses_result(node, 1):
        raise refused("adaptive_max_pool2d cannot return positions", node, "Use its values alone.")
    if wanted == [1, 1]:
        result = relax.op.max(x, [-2, -1], keepdims=True)
    else:
        size = sizes(x)[-2:]
        both = list(zip(size, wanted, strict=True))
        even = all(isinstance(old, int) and old % new == 0 for old, new in both)
        if not even or x.ty.ndim != 4:
            raise refused(
                f"adaptive_max_pool2d from {tuple(map(str, size))} to {tuple(wanted)} has windows "
                "of different sizes",
                node,
                "Pool to one pixel, or to a size that divides a fixed one; or use max_pool2d.",
            )
        window = [old // new for old, new in both]
        result = relax.op.nn.max_pool2d(x, window, strides=window)
    values = importer.block_builder.emit(result)
    return importer.block_builder.emit(relax.Tuple([values, values]))


_DISTRIBUTIONS: Final = {"var": _variance, "std": _deviation}

REDUCTIONS: Final[dict[str, Callable[[Node, Any], relax.Var]]] = {
    "adaptive_max_pool2d.default": _adaptive_max_pool,
    "amax.default": _reduced(relax.op.max),
    "amin.default": _reduced(relax.op.min),
    "count_nonzero.default": _count_nonzero,
    "count_nonzero.dim_IntList": _count_nonzero,
    "max.dim": _extremum(relax.op.max, relax.op.argmax),
    "min.dim": _extremum(relax.op.min, relax.op.argmin),
    "prod.dim_int": _reduced(relax.op.prod),
    **{
        f"{name}{infix}.{overload}": wrap(converter)
        for name, converter in _DISTRIBUTIONS.items()
        for infix, wrap in (("", lambda same: same), ("_mean", _with_mean))
        for overload in ("default", "dim", "correction")
    },
}
