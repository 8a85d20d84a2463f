"""Export of a problem's PyTorch module to ONNX, for the runtimes that read ONNX files."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn

from dcnv3_tvm import files

OPSET: Final = 20
"""ONNX operator set of the export."""


class OnnxFile:
    """An ONNX file in a temporary folder, which is deleted with this object.

    Parameters
    ----------
    module : torch.nn.Module
        Module to export, for the shapes of `inputs`.
    inputs : mapping of str to numpy.ndarray
        Arguments by name, in order.
    translations : mapping, optional
        ``custom_translation_table`` of the exporter.
    """

    def __init__(
        self,
        module: nn.Module,
        inputs: Mapping[str, Any],
        translations: Mapping[Any, Any] | None = None,
    ) -> None:
        self._folder = files.temporary_folder("bench-")
        self.path = Path(self._folder.name) / "model.onnx"
        with _quiet():
            program = torch.onnx.export(
                module,
                tuple(torch.from_numpy(array) for array in inputs.values()),
                input_names=list(inputs),
                opset_version=OPSET,
                dynamo=True,
                verbose=False,
                custom_translation_table=dict(translations or {}),
            )
            if program is None:
                raise RuntimeError("torch.onnx.export returned no program")
            # An ONNX file holds at most 2 GB, so the weights go to a separate file.
            program.save(self.path, external_data=True)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Suppress the exporter's messages about optional packages."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
