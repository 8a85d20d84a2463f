"""Converters of operators that take elements by index.

TVM's converters read outside of the tensor for negative indices and for indices that are too
large. PyTorch counts the first from the end and raises an error for the second; compiled code
returns NaN for these, or in a tensor of integers the first or last element.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Final, cast

import numpy as np
from torch.fx import Node
from tvm import relax

from dcnv3_tvm.frontend.torch.fx_nodes import (
    constant,
    node_arguments,
    size_minus_one,
    size_tensor,
    unsupported,
)
from dcnv3_tvm.op.expr import product
from dcnv3_tvm.transform.ir import dimensions, element_type


def _embedding(node: Node, importer: Any) -> relax.Var:
    args = node_arguments(node, importer)
    return _take(args["weight"], args["indices"], 0, importer)


def _index_select(node: Node, importer: Any) -> relax.Var:
    args = node_arguments(node, importer)
    x, indices = args["self"], args["index"]
    if indices.ty.ndim == 0:
        indices = relax.op.reshape(indices, (1,))
    return _take(x, indices, args["dim"], importer)


def _gather(node: Node, importer: Any) -> relax.Var:
    args = node_arguments(node, importer)
    x, axis, indices = args["self"], args["dim"], args["index"]
    emit = importer.block_builder.emit
    last = size_minus_one(dimensions(x)[axis], importer, "int64")
    inside = emit(relax.op.minimum(relax.op.maximum(indices, constant(0, "int64")), last))
    result = emit(relax.op.gather_elements(x, inside, axis))
    if not element_type(x).startswith("float"):
        return result
    missing = constant(np.nan, element_type(x))
    return emit(relax.op.where(relax.op.equal(indices, inside), result, missing))


def _index(node: Node, importer: Any) -> relax.Var:
    """Convert ``x[:, i, j]``: index tensors are broadcast and select along their axes together."""
    args = node_arguments(node, importer)
    x, indices = args["self"], args["indices"]
    axes = [axis for axis, index in enumerate(indices) if index is not None]
    if any(element_type(indices[axis]) == "bool" for axis in axes):
        raise unsupported(
            "a selection by a mask has a size that is unknown at compile time",
            node,
            "Use torch.where.",
        )
    emit = importer.block_builder.emit
    sizes = dimensions(x)
    wrapped = [_from_the_end(indices[axis], sizes[axis], importer) for axis in axes]
    if len(axes) == 1:
        return _take(x, wrapped[0], axes[0], importer)
    # Step 1. The indexed axes come first, as one.
    others = [axis for axis in range(len(sizes)) if axis not in axes]
    rows = product([sizes[axis] for axis in axes])
    table = emit(relax.op.permute_dims(x, [*axes, *others]))
    table = emit(relax.op.reshape(table, (rows, *(sizes[axis] for axis in others))))
    # Step 2. One index replaces several; -1 where one of them lies outside.
    lasts = [size_minus_one(sizes[axis], importer, "int64") for axis in axes]
    linear, inside = wrapped[0], _is_inside(wrapped[0], lasts[0])
    for index, last in zip(wrapped[1:], lasts[1:], strict=True):
        count = relax.op.add(last, constant(1, "int64"))
        linear = emit(relax.op.add(relax.op.multiply(linear, count), index))
        inside = emit(relax.op.logical_and(inside, _is_inside(index, last)))
    linear = emit(relax.op.where(inside, linear, constant(-1, "int64")))
    result = _take(table, linear, 0, importer)
    # Step 3. The result of adjacent axes takes their place, that of others stays first.
    rank = linear.ty.ndim
    before = axes[0] if axes == list(range(axes[0], axes[-1] + 1)) else 0
    order = [*range(rank, rank + before), *range(rank), *range(rank + before, rank + len(others))]
    return emit(relax.op.permute_dims(result, order))


def _index_put(node: Node, importer: Any) -> relax.Var:
    # TVM's converter supports no masks.
    args = node_arguments(node, importer)
    x, indices, values = args["self"], args["indices"], args["values"]
    if len(indices) != 1 or element_type(indices[0]) != "bool":
        return importer._index_put(node)
    if math.prod(cast("Node", node.args[2]).meta["val"].shape) != 1 or args["accumulate"]:
        raise unsupported(
            "an assignment of several values to what a mask selects is not supported",
            node,
            "Use torch.where.",
        )
    emit = importer.block_builder.emit
    (mask,) = indices
    mask = emit(relax.op.expand_dims(mask, list(range(mask.ty.ndim, x.ty.ndim))))
    return emit(relax.op.where(mask, relax.op.reshape(values, ()), x))


def _take(x: relax.Expr, indices: relax.Expr, axis: int, importer: Any) -> relax.Var:
    mode = "nan" if element_type(x).startswith("float") else "clip"
    return importer.block_builder.emit(relax.op.take(x, indices, axis, mode))


def _from_the_end(index: relax.Expr, size: Any, importer: Any) -> relax.Var:
    """Replace negative indices."""
    emit = importer.block_builder.emit
    index = emit(relax.op.astype(index, "int64"))
    count = size_tensor(size, importer, "int64")
    negative = relax.op.less(index, constant(0, "int64"))
    return emit(relax.op.where(negative, relax.op.add(index, count), index))


def _is_inside(index: relax.Expr, last: relax.Expr) -> relax.Expr:
    return relax.op.logical_and(
        relax.op.greater_equal(index, constant(0, "int64")), relax.op.less_equal(index, last)
    )


INDEXING: Final[dict[str, Callable[[Node, Any], relax.Var]]] = {
    "embedding.default": _embedding,
    "gather.default": _gather,
    "index.Tensor": _index,
    "index_put.default": _index_put,
    "index_select.default": _index_select,
}
