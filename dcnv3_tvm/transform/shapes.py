"""Shapes of Relax expressions as Python values."""

from __future__ import annotations

from typing import Any

import tvm
from tvm import relax


def dimensions(expr: relax.Expr) -> tuple[Any, ...]:
    """Return the shape of a tensor: integers, and TensorIR expressions where a size is symbolic."""
    return tuple(
        int(size) if isinstance(size, int | tvm.tirx.IntImm) else size for size in expr.ty.shape
    )


def static_shape(expr: relax.Expr) -> tuple[int, ...] | None:
    """Return the shape of a tensor, or None if a size of it is known only at run time."""
    if not isinstance(expr.ty, relax.TensorType) or expr.ty.shape is None:
        return None
    sizes = dimensions(expr)
    return sizes if all(isinstance(size, int) for size in sizes) else None


def element_type(expr: relax.Expr) -> str:
    """Return the element type of a tensor."""
    return str(expr.ty.dtype.dtype)
