"""Read nodes of an exported program (``torch.fx``) for the converters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch.fx import Node
from tvm import relax

from dcnv3_tvm.errors import ModelImportError


def node_arguments(node: Node, importer: Any) -> dict[str, Any]:
    """Return all arguments of a node by name, as Relax values, including defaults."""
    schema = node.target._schema.arguments  # type: ignore[union-attr]
    values: dict[str, Any] = {
        each.name: each.default_value for each in schema if each.has_default_value()
    }
    values |= zip((each.name for each in schema), importer.retrieve_args(node), strict=False)
    values |= importer._retrieve_args(dict(node.kwargs))
    return values


def constant(array: Any, dtype: str = "float32") -> relax.Expr:
    """Return a Relax constant."""
    return relax.const(np.asarray(array, dtype), dtype)


def operand(value: Any, dtype: str) -> relax.Expr:
    """Return an operand, a tensor or a number, as a tensor."""
    return value if isinstance(value, relax.Expr) else constant(value, dtype)


def size_minus_one(size: Any, importer: Any, dtype: str = "float32") -> relax.Expr:
    """Return ``size - 1`` as a scalar tensor; `size` is an integer or symbolic."""
    if isinstance(size, int):
        return constant(size - 1, dtype)
    # Relax cannot convert a symbolic size to a tensor.
    indices = relax.op.astype(relax.op.arange(0, size, 1, "int64"), dtype)
    return importer.block_builder.emit(relax.op.max(indices))


def size_tensor(size: Any, importer: Any, dtype: str) -> relax.Var:
    """Return an integer or symbolic size as a scalar tensor."""
    last = size_minus_one(size, importer, dtype)
    return importer.block_builder.emit(relax.op.add(last, constant(1, dtype)))


def reduction_axes(x: relax.Expr, dim: int | Sequence[int] | None) -> list[int]:
    """Return the axes of a PyTorch reduction as non-negative integers; None means all axes."""
    rank = x.ty.ndim
    if dim is None or dim == []:
        return list(range(rank))
    return [axis % rank for axis in ([dim] if isinstance(dim, int) else dim)]


def uses_result(node: Node, index: int) -> bool:
    """Whether any node reads result `index` of a node that returns several tensors."""
    return any(user.args[1:] == (index,) and user.users for user in node.users)


def unsupported(problem: str, node: Node, hint: str) -> ModelImportError:
    """Return the error for a node whose arguments have no conversion."""
    return ModelImportError(problem, got=source_line(node), hint=hint)


def source_line(node: Node) -> str:
    """Return a node's operator and the line of the model's source that calls it."""
    trace = [line.strip() for line in (node.stack_trace or "").splitlines() if line.strip()]
    return f"{node.target}: {' | '.join(trace[-2:]) or 'source unknown'}"
