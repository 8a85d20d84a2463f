"""Settings that say how an image becomes the input of a model."""

from __future__ import annotations

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
