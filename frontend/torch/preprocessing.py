"""Preprocessing and labels that are given with a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dcnv3_tvm.errors import InvalidArgumentError
from dcnv3_tvm.preprocessing import SETTINGS, check_settings, size_settings
from dcnv3_tvm.signature import TensorInfo


def complete_settings(given: Mapping[str, Any], image: TensorInfo) -> dict[str, Any]:
    """Check settings of `CompiledModel.preprocess`, and complete them for an input.

    Parameters
    ----------
    given : mapping
        ``mean`` and ``std``, and others of `dcnv3_tvm.preprocessing.SETTINGS`.
    image : TensorInfo
        The input at the size of the example, which is the default of ``crop``.

    Raises
    ------
    InvalidArgumentError
        If a setting is missing, unknown or invalid, or the input is not an RGB image.
    """
    if not isinstance(given, Mapping):
        raise InvalidArgumentError(
            "the preprocessing is not a mapping",
            got=repr(given),
            allowed=f"a dict with {', '.join(SETTINGS)}; all but mean and std have defaults",
        )
    layout = image.layout
    if not layout or image.shape[layout.index("C")] != 3 or image.dtype != "float32":
        raise InvalidArgumentError(
            "preprocessing makes RGB images of float32, which the first input does not take",
            got=f"{image.name}: {image.describe()} {image.dtype}",
            allowed="(N, 3, H, W) or (N, H, W, 3), float32",
        )
    size = [image.shape[layout.index(axis)] for axis in "HW"]
    settings = check_settings(size_settings(size) | {"layout": layout} | dict(given))
    if settings["layout"] != layout:
        raise InvalidArgumentError(
            "the layout of the preprocessing is not that of the input",
            got=settings["layout"],
            allowed=image.describe(),
        )
    return settings


def check_labels(labels: Sequence[str], outputs: Sequence[TensorInfo]) -> tuple[str, ...]:
    """Return labels, one for each class of an output, or none.

    Raises
    ------
    InvalidArgumentError
        If they are not strings, or no output has as many classes (axis 1).
    """
    is_sequence = hasattr(labels, "__iter__") and not isinstance(labels, str | Mapping)
    if not is_sequence or not all(isinstance(label, str) for label in labels):
        raise InvalidArgumentError(
            "the labels are not a sequence of strings",
            got=type(labels).__name__,
            allowed="a name for each class, in order",
        )
    names = tuple(map(str, labels))
    classes = [output.shape[1] for output in outputs if len(output.shape) >= 2]
    if names and len(names) not in classes:
        raise InvalidArgumentError(
            "the number of labels is not that of the classes",
            got=f"{len(names)} labels",
            allowed=", ".join(map(str, classes)) or "no output has classes",
        )
    return names
