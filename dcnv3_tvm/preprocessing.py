"""Settings that say how an image becomes the input of a model."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Final

from dcnv3_tvm import checks
from dcnv3_tvm.errors import InvalidArgumentError

SETTINGS: Final = ("resize", "crop", "mean", "std", "interpolation", "layout")
"""Names of the settings: length of the shorter side, (height, width) of the crop, then mean and
standard deviation of R, G and B between 0 and 1."""

_INTERPOLATIONS: Final = ("bicubic", "bilinear", "box", "hamming", "lanczos", "nearest")

_MAX_SIZE: Final = 1 << 14
"""Pixels of the shorter side, and of the crop: bounds the memory."""


def size_settings(size: Sequence[Any]) -> dict[str, Any]:
    """Return the settings that make images of a height and width, without a margin."""
    return {"crop": size, "resize": max(size)}


def parse_image_size(text: str) -> tuple[int, int]:
    """Return height and width of ``HxW``, or of one number for both.

    Raises
    ------
    InvalidArgumentError
        If the text is something else, or a side is too long.

    Examples
    --------
    >>> parse_image_size("384x640"), parse_image_size("224")
    ((384, 640), (224, 224))
    """
    match = re.fullmatch(r"(\d{1,9})(?:[xX](\d{1,9}))?", text, re.ASCII)
    sides = () if match is None else (int(match[1]), int(match[2] or match[1]))
    if not sides or not all(1 <= side <= _MAX_SIZE for side in sides):
        raise InvalidArgumentError(
            "the image size is invalid",
            got=repr(text),
            allowed=f"height and width such as 384x640, or 224 for both, from 1 to {_MAX_SIZE}",
        )
    return sides


def check_settings(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return valid settings as plain values, complete with defaults.

    Raises
    ------
    InvalidArgumentError
        If a setting is missing, unknown or invalid.
    """
    settings = {"interpolation": "bicubic", "layout": "NCHW"} | dict(given)
    if settings.keys() != set(SETTINGS):
        missing = [f"no {name}" for name in SETTINGS if name not in settings]
        unknown = [str(name) for name in settings if name not in SETTINGS]
        raise InvalidArgumentError(
            "the preprocessing settings are incomplete or unknown",
            got=", ".join([*missing, *unknown]),
            allowed=", ".join(SETTINGS),
        )
    for name, allowed in (("interpolation", _INTERPOLATIONS), ("layout", ("NCHW", "NHWC"))):
        if settings[name] not in allowed:
            raise InvalidArgumentError(
                f"{name} is unknown", got=repr(settings[name]), allowed=", ".join(allowed)
            )
    return settings | {
        "resize": checks.integer("resize", settings["resize"], low=1, high=_MAX_SIZE),
        "crop": list(checks.pair("crop", settings["crop"], low=1, high=_MAX_SIZE)),
        "mean": _per_channel("mean", settings["mean"]),
        "std": _per_channel("std", settings["std"]),
    }


def _per_channel(name: str, value: Any) -> list[float]:
    numbers = [checks.finite(name, number) for number in value] if _is_sequence(value) else []
    if len(numbers) != 3 or (name == "std" and min(numbers) <= 0):
        raise InvalidArgumentError(
            f"{name} is invalid",
            got=repr(value),
            allowed="a number for each of R, G and B" + (", above 0" if name == "std" else ""),
        )
    return numbers


def _is_sequence(value: Any) -> bool:
    return hasattr(value, "__iter__") and not isinstance(value, str | Mapping)
