"""TensorIR expressions of extents and indices.

All extents and loop variables are int64, so that tensors of more than 2**31 elements are addressed
correctly.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any, Final

from tvm import tirx

KERNEL_ATTR: Final = "dcnv3_tvm.kernel"
"""Function attribute with the name of the kernel, which schedule rules look for."""


def int64(value: Any) -> Any:
    """Convert a Python integer or constant to an int64 constant; return other expressions as is."""
    if isinstance(value, tirx.IntImm):
        value = value.value
    return tirx.IntImm("int64", int(value)) if hasattr(value, "__index__") else value


def static(value: Any) -> int | None:
    """Return the value of a constant extent, ``None`` for a dynamic one."""
    if isinstance(value, tirx.IntImm):
        return int(value.value)
    return int(value) if hasattr(value, "__index__") else None


def extent_text(value: Any) -> int | str:
    """Return a constant extent, or the text of a dynamic one, such as ``(h + 1) // 2``."""
    known = static(value)
    return re.sub(r"T\.int64\((-?\d+)\)", r"\1", str(value)) if known is None else known


def product(extents: Sequence[Any]) -> Any:
    """Multiply extents, constants first, so that a dynamic product has one constant factor."""
    constant = math.prod(size for size in map(static, extents) if size is not None)
    symbolic = [size for size in extents if static(size) is None]
    return math.prod(symbolic, start=int64(constant)) if symbolic else int64(constant)


def constant_factor(extent: Any) -> int:
    """Return the constant factor of a product as `product` builds it; 1 without one."""
    if isinstance(extent, tirx.Mul):
        return constant_factor(extent.a) * constant_factor(extent.b)
    return static(extent) or 1


def unflatten(index: Any, extents: Sequence[Any]) -> list[Any]:
    """Split a row-major position into one index per extent."""
    indices: list[Any] = []
    for size in reversed(extents[1:]):
        indices.append(tirx.floormod(index, size))
        index = tirx.floordiv(index, size)
    return [index, *reversed(indices)]


def cast(dtype: str, value: Any) -> Any:
    """Cast an expression, unless it already has the type."""
    return value if str(value.ty.dtype) == dtype else tirx.Cast(dtype, value)
