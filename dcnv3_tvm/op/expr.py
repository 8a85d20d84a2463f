"""TensorIR expressions: int64 extents, static sizes, row-major positions.

All extents and loop variables are int64, so that more than 2**31 elements are addressed correctly.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Final

from tvm import tirx

KERNEL_ATTR: Final = "dcnv3_tvm.kernel"
"""Function attribute that names the kernel, by which schedule rules recognise it."""


def int64(value: Any) -> Any:
    """Return a Python integer or a constant as an int64 constant; other expressions unchanged."""
    if isinstance(value, tirx.IntImm):
        value = value.value
    return tirx.IntImm("int64", int(value)) if hasattr(value, "__index__") else value


def static(value: Any) -> int | None:
    """Return the value of a constant extent, ``None`` for a symbolic one."""
    if isinstance(value, tirx.IntImm):
        return int(value.value)
    return int(value) if hasattr(value, "__index__") else None


def product(extents: Sequence[Any]) -> Any:
    """Multiply extents, constants first, so that a symbolic product keeps its constant factor."""
    constant = math.prod(size for size in map(static, extents) if size is not None)
    symbolic = [size for size in extents if static(size) is None]
    return math.prod(symbolic, start=int64(constant)) if symbolic else int64(constant)


def constant_factor(extent: Any) -> int:
    """Return the constant factor of a product as `product` builds it; 1 without one."""
    if isinstance(extent, tirx.Mul):
        return constant_factor(extent.a) * constant_factor(extent.b)
    return static(extent) or 1


def unflatten(index: Any, extents: Sequence[Any]) -> list[Any]:
    """Split a row-major position into one index an extent."""
    indices: list[Any] = []
    for size in reversed(extents[1:]):
        indices.append(tirx.floormod(index, size))
        index = tirx.floordiv(index, size)
    return [index, *reversed(indices)]


def cast(dtype: str, value: Any) -> Any:
    """Convert an expression to a type; it stays as it is where it has that type."""
    return value if str(value.ty.dtype) == dtype else tirx.Cast(dtype, value)
