"""The module of a problem as an ONNX file, for the runtimes that read one."""

from __future__ import annotations

import contextlib
import io
import logging
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn

OPSET: Final = 20
"""ONNX operator set of the export; GridSample is in it since 16."""


class OnnxFile:
    """An ONNX file in a temporary folder, which goes away with this object.

    Parameters
    ----------
    module : torch.nn.Module
        What is exported, for the shapes of `inputs`.
    inputs : mapping of str to numpy.ndarray
        Arguments by name, in order.
    translations : mapping, optional
        How operators that the exporter does not know are written.
    """

    def __init__(
        self,
        module: nn.Module,
        inputs: Mapping[str, Any],
        translations: Mapping[Any, Any] | None = None,
    ) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="dcnv3-tvm-bench-")
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
                raise RuntimeError("the export gave no program")
            # Weights in a file of their own, because one ONNX file holds no more than 2 GB.
            program.save(self.path, external_data=True)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's notes about packages it does not need from the terminal."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
