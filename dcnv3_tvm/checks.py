"""Convert arguments to plain values, and reject invalid ones with an error that names them."""

from __future__ import annotations

import numbers
import operator
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from dcnv3_tvm.errors import InvalidArgumentError

_FLOAT32_MAX: Final = 3.4028234e38


def integer(name: str, value: Any, *, low: int, high: int | None = None) -> int:
    """Return an integer from `low` to `high`."""
    number = _plain(value)
    if not _is_integer(number) or number < low or (high is not None and number > high):
        upper = "" if high is None else f" and at most {high}"
        raise InvalidArgumentError(
            f"{name} is out of range",
            got=repr(value),
            allowed=f"an integer of at least {low}{upper}",
        )
    return operator.index(number)


def pair(name: str, value: Any, *, low: int, high: int | None = None) -> tuple[int, int]:
    """Return (height, width) from one integer for both or a pair, each from `low` to `high`."""
    plain = _plain(value)
    values = [_plain(v) for v in plain] if isinstance(plain, Sequence) else [plain, plain]
    if len(values) != 2 or not all(map(_is_integer, values)):
        raise InvalidArgumentError(
            f"{name} is not an integer or a (height, width) pair",
            got=repr(value),
            allowed=f"{name}=3 or {name}=(3, 5)",
        )
    height, width = (integer(name, each, low=low, high=high) for each in values)
    return height, width


def finite(name: str, value: Any) -> float:
    """Return a number that is finite in float32."""
    plain = _plain(value)
    is_number = isinstance(plain, numbers.Real) and not isinstance(plain, bool)
    if not is_number or not abs(plain) <= _FLOAT32_MAX:
        raise InvalidArgumentError(
            f"{name} is not a finite number",
            got=repr(value),
            allowed=f"a number between -{_FLOAT32_MAX:.2g} and {_FLOAT32_MAX:.2g}",
        )
    return float(plain)


def path(name: str, value: Any) -> Path:
    """Return a path, given as such or as text."""
    if not isinstance(value, str | os.PathLike) or not isinstance(os.fspath(value), str):
        raise InvalidArgumentError(
            f"{name} is not a path", got=repr(value), allowed="str or pathlib.Path"
        )
    if not os.fspath(value) or "\0" in os.fspath(value):
        raise InvalidArgumentError(f"{name} is not a valid path", got=repr(value))
    return Path(value)


def outside(name: str, value: Path, folder: Path) -> None:
    """Check that what will be written is not in a folder that is read, or replaced as a whole."""
    place = os.path.realpath(folder)
    if Path(os.path.realpath(value)).is_relative_to(place):
        raise InvalidArgumentError(
            f"{name} is inside {folder}, which the same call reads or replaces",
            got=value,
            hint="Choose a path outside.",
        )


def boolean(name: str, value: Any) -> bool:
    """Return a boolean, given as such or as 0 or 1."""
    plain = _plain(value)
    if not isinstance(plain, int) or plain not in (0, 1):
        raise InvalidArgumentError(
            f"{name} is not a boolean", got=repr(value), allowed="True or False"
        )
    return bool(plain)


def _plain(value: Any) -> Any:
    """Return scalars and arrays of NumPy and PyTorch as numbers and lists of Python."""
    return value.tolist() if hasattr(value, "tolist") else value


def _is_integer(value: Any) -> bool:
    return hasattr(value, "__index__") and not isinstance(value, bool)
