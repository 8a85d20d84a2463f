"""What a node of an exported program is given, as Relax."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch.fx import Node
from tvm import relax, tirx

from dcnv3_tvm.errors import ModelImportError


def arguments(node: Node, importer: Any) -> dict[str, Any]:
    """Return the arguments of a node by name, with the defaults of those that are left out."""
    schema = node.target._schema.arguments  # type: ignore[union-attr]
    values: dict[str, Any] = {
        each.name: each.default_value for each in schema if each.has_default_value()
    }
    values |= zip((each.name for each in schema), importer.retrieve_args(node), strict=False)
    values |= importer._retrieve_args(dict(node.kwargs))
    return values


def sizes(x: relax.Expr) -> list[Any]:
    """Return the shape of a tensor: integers, and TensorIR expressions where a size is open."""
    return [int(size) if isinstance(size, tirx.IntImm) else size for size in x.ty.shape]


def dtype_of(x: relax.Expr) -> str:
    """Return the element type of a tensor."""
    return str(x.ty.dtype.dtype)


def constant(array: Any, dtype: str = "float32") -> relax.Expr:
    """Return a literal."""
    return relax.const(np.asarray(array, dtype), dtype)


def counted(size: Any, importer: Any, dtype: str = "float32") -> relax.Expr:
    """Return a size, known or open, less one, as a tensor of one number."""
    if isinstance(size, int):
        return constant(size - 1, dtype)
    numbers = relax.op.astype(relax.op.arange(0, size, 1, "int64"), dtype)
    return importer.block_builder.emit(relax.op.max(numbers))


def refused(problem: str, node: Node, hint: str) -> ModelImportError:
    """Return the error for a node that has no converter for its arguments."""
    return ModelImportError(problem, got=source_line(node), hint=hint)


def source_line(node: Node) -> str:
    """Tell the operator of a node and where the model calls it."""
    trace = [line.strip() for line in (node.stack_trace or "").splitlines() if line.strip()]
    return f"{node.target}: {' | '.join(trace[-2:]) or 'source unknown'}"


def uses_result(node: Node, number: int) -> bool:
    """Tell whether anything uses a result of a node that has several."""
    return any(user.args[1:] == (number,) and user.users for user in node.users)


def axes_of(x: relax.Expr, dim: int | Sequence[int] | None) -> list[int]:
    """Return the axes that a PyTorch reduction is over: none given means all."""
    rank = x.ty.ndim
    if dim is None or dim == []:
        return list(range(rank))
    return [axis % rank for axis in ([dim] if isinstance(dim, int) else dim)]
