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


def import_onnx_file(arguments: argparse.Namespace) -> ImportedModel:
    """Import the file that ``compile`` was given.

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
    from dcnv3_tvm.frontend.onnx.importer import import_onnx, input_shapes

    shapes = {}
    if arguments.size is not None or arguments.dynamic_batch or arguments.batch != 1:
        inputs = input_shapes(arguments.model)
        if len(inputs) != 1 or len(next(iter(inputs.values()))) != 4:
            raise InvalidArgumentError(
                "--batch, --size and --dynamic-batch are for models of one image",
                got=", ".join(f"{name} {shape}" for name, shape in inputs.items()),
                hint="Import it in Python: import_onnx(path, shapes={...}).",
            )
        ((name, (_, channels, height, width)),) = inputs.items()
        if arguments.size is not None:
            height, width = arguments.size
        batch = BATCH if arguments.dynamic_batch else arguments.batch
        shapes[name] = (batch, channels, height, width)
    imported = import_onnx(arguments.model, shapes=shapes, labels=read_labels(arguments.labels))
    weights = Path(arguments.model).name
    return dataclasses.replace(imported, config=imported.config | {"weights": weights})
