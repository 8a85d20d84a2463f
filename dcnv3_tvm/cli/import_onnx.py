"""Import of an ONNX file for ``dcnv3-tvm compile``."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Final

from dcnv3_tvm.cli.arguments import read_labels
from dcnv3_tvm.errors import InvalidArgumentError
from dcnv3_tvm.signature import BATCH

if TYPE_CHECKING:
    from dcnv3_tvm.imported_model import ImportedModel

_NOT_FOR_ONNX: Final = {
    "checkpoint": None,
    "random_weights": None,
    "num_classes": None,
    "features_only": False,
    "use_ema": False,
    "ignore_objects": False,
    "dynamic_size": 0,
}
"""Options of a PyTorch model, with their defaults."""


def import_onnx_file(arguments: argparse.Namespace) -> list[ImportedModel]:
    """Import the file that ``compile`` was given, for each image size.

    Raises
    ------
    InvalidArgumentError
        If an option is for PyTorch models only, or needs one input that is an image.
    ModelImportError
        If the file cannot be imported.
    """
    for name, default in _NOT_FOR_ONNX.items():
        if getattr(arguments, name) != default:
            raise InvalidArgumentError(
                "an ONNX file has its weights and outputs",
                got=f"--{name.replace('_', '-')}",
                hint="Choose them when exporting the model to ONNX.",
            )
    from dcnv3_tvm.frontend.onnx.importer import import_onnx

    labels = read_labels(arguments.labels)
    weights = Path(arguments.model).name
    imported = [
        import_onnx(arguments.model, shapes=shapes, labels=labels) for shapes in _shapes(arguments)
    ]
    return [
        dataclasses.replace(each, config=each.config | {"weights": weights}) for each in imported
    ]


def _shapes(arguments: argparse.Namespace) -> list[dict[str, tuple[int | str, ...]]]:
    """Return the shapes of the input for each image size; none for those of the file."""
    from dcnv3_tvm.frontend.onnx.importer import input_shapes

    if arguments.size is None and not arguments.dynamic_batch and arguments.batch == 1:
        return [{}]
    inputs = input_shapes(arguments.model)
    if len(inputs) != 1 or len(next(iter(inputs.values()))) != 4:
        raise InvalidArgumentError(
            "--batch, --size and --dynamic-batch are for models of one image",
            got=", ".join(f"{name} {shape}" for name, shape in inputs.items()),
            hint="Import it in Python: import_onnx(path, shapes={...}).",
        )
    ((name, (_, channels, *own)),) = inputs.items()
    batch = BATCH if arguments.dynamic_batch else arguments.batch
    return [
        {name: (batch, channels, *size)} for size in dict.fromkeys(arguments.size or [tuple(own)])
    ]
