"""Join imports of a model at several image sizes to one model with entries for each."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import tvm

from dcnv3_tvm.errors import InvalidArgumentError
from dcnv3_tvm.imported_model import ImportedModel
from dcnv3_tvm.signature import TensorInfo, size_name, sized_entry

_HINT = (
    "Import the same model once for each size: "
    "[import_model(model, example=(1, 3, *size)) for size in [(224, 224), (384, 640)]]."
)


def join_sizes(models: ImportedModel | Sequence[ImportedModel]) -> ImportedModel:
    """Return one model that has the entries of each; the weights are held once.

    Parameters
    ----------
    models : ImportedModel or sequence of ImportedModel
        Imports of one model that differ in height and width of their inputs. The entries of the
        first keep their names.

    Raises
    ------
    InvalidArgumentError
        If one is not imported, has a dynamic size or that of another, or is of another model.
    """
    listed = [models] if isinstance(models, ImportedModel) else models
    if not isinstance(listed, Sequence) or not all(isinstance(m, ImportedModel) for m in listed):
        raise InvalidArgumentError(
            "the model is not imported",
            got=type(models).__name__,
            hint="Import it first: dcnv3_tvm.frontend.import_model(model, example=...).",
        )
    if not listed:
        raise InvalidArgumentError("there is no model to compile", got="an empty list", hint=_HINT)
    first, *others = listed
    if not others:
        return first
    functions = dict(first.module.functions_items())
    entries = dict(first.entries)
    sizes: dict[str, dict[str, Any]] = {}
    seen = {_size(first)}
    for model in others:
        size = _size(model)
        if size in seen:
            raise InvalidArgumentError(
                "two of the models have one image size", got=size, hint="Import each size once."
            )
        seen.add(size)
        _check_same_model(first, model)
        sizes[size] = model.preprocessing
        for name, entry in model.entries.items():
            sized = sized_entry(name, size)
            entries[sized] = entry
            functions[sized] = model.module[name].with_attr("global_symbol", sized)
    return dataclasses.replace(first, module=tvm.IRModule(functions), entries=entries, sizes=sizes)


def _size(model: ImportedModel) -> str:
    """Return height and width of the image that a model takes, such as ``"384x640"``."""
    image = model.entries["main"].inputs[0]
    if image.image_size is None:
        raise InvalidArgumentError(
            "a model of several image sizes needs a fixed height and width for each",
            got=f"{image.name}: {image.describe()}",
            hint="Import it without dynamic_size.",
        )
    return size_name(image.image_size)


def _check_same_model(first: ImportedModel, other: ImportedModel) -> None:
    """Check that two imports differ in height and width only."""
    differences = {
        "names": (first.name, other.name),
        "entries": (list(first.entries), list(other.entries)),
        "inputs": tuple(
            [_sizeless(info) for info in model.entries["main"].inputs] for model in (first, other)
        ),
        "labels": (first.labels, other.labels),
        "weights": (sorted(first.weights), sorted(other.weights)),
    }
    for what, (ours, theirs) in differences.items():
        if ours != theirs:
            raise _not_one_model(f"their {what} differ: {ours} and {theirs}")
    changed = _changed_weight(first.weights, other.weights)
    if changed is not None:
        raise _not_one_model(f"the weight {changed} differs")


def _sizeless(info: TensorInfo) -> TensorInfo:
    """Leave height and width out of an input."""
    spatial = info.spatial_axes if len(info.shape) >= 4 else ()
    shape = tuple("any" if axis in spatial else size for axis, size in enumerate(info.shape))
    return dataclasses.replace(info, shape=shape)


def _changed_weight(ours: Mapping[str, np.ndarray], theirs: Mapping[str, np.ndarray]) -> str | None:
    """Return the name of a weight whose values differ, if any."""
    for name, array in ours.items():
        other = theirs[name]
        same = array.__array_interface__["data"] == other.__array_interface__["data"]
        if not (same and array.shape == other.shape) and not np.array_equal(
            array, other, equal_nan=True
        ):
            return name
    return None


def _not_one_model(difference: str) -> InvalidArgumentError:
    return InvalidArgumentError(
        "the models for several image sizes are not imports of one", got=difference, hint=_HINT
    )
