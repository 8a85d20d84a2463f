"""Convert arguments to plain values, and reject invalid ones with an error that names them."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dcnv3_tvm.errors import InvalidArgumentError


def integer(name: str, value: Any, *, low: int, high: int | None = None) -> int:
    """Return an integer from `low` to `high`."""
    if not _is_integer(value) or value < low or (high is not None and value > high):
        upper = "" if high is None else f" and at most {high}"
        raise InvalidArgumentError(
            f"{name} is out of range",
            got=repr(value),
            allowed=f"an integer of at least {low}{upper}",
        )
    return int(value)


def pair(name: str, value: Any, *, low: int, high: int | None = None) -> tuple[int, int]:
    """Return (height, width) from one integer for both or a pair, each from `low` to `high`."""
    values = tuple(value) if isinstance(value, Sequence) else (value, value)
    if len(values) != 2 or not all(_is_integer(each) for each in values):
        raise InvalidArgumentError(
            f"{name} is not an integer or a (height, width) pair",
            got=repr(value),
            allowed=f"{name}=3 or {name}=(3, 5)",
        )
    height, width = (integer(name, each, low=low, high=high) for each in values)
    return height, width


def finite(name: str, value: Any) -> float:
    """Return a finite number."""
    try:
        number = float(value) if hasattr(value, "__float__") else math.nan
    except (TypeError, ValueError, OverflowError):  # An array; an integer of 400 digits.
        number = math.nan
    if not math.isfinite(number):
        raise InvalidArgumentError(f"{name} is not a finite number", got=repr(value))
    return number


def path(name: str, value: Any) -> Path:
    """Return a path, given as such or as text."""
    if not isinstance(value, str | os.PathLike) or not isinstance(os.fspath(value), str):
        raise InvalidArgumentError(
            f"{name} is not a path", got=repr(value), allowed="str or pathlib.Path"
        )
    if not os.fspath(value) or "\0" in os.fspath(value):
        raise InvalidArgumentError(f"{name} is not a valid path", got=repr(value))
    return Path(value)


def boolean(name: str, value: Any) -> bool:
    """Return a boolean, given as such or as 0 or 1."""
    if value not in (False, True):
        raise InvalidArgumentError(f"{name} is not a boolean", got=repr(value))
    return bool(value)


def _is_integer(value: Any) -> bool:
    return hasattr(value, "__index__") and not isinstance(value, bool)
