"""Compare an exported file with the model that it comes from."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn

from dcnv3_tvm.errors import ModelExportError
from dcnv3_tvm.frontend.torch.entry_points import flatten_result

_TOLERANCE = 1e-3
"""Of the largest value, in float32: two runtimes differ by some 1e-6."""


def error_in_onnxruntime(path: Path, model: nn.Module, shape: Sequence[int]) -> float | None:
    """Run a file in ONNX Runtime on a random image; None if that is not installed.

    Parameters
    ----------
    path : Path
        The file.
    model : nn.Module
        What it was exported from.
    shape : sequence of int
        Of the image.

    Returns
    -------
    float or None
        Largest difference from the model's outputs, relative to the largest value of each.

    Raises
    ------
    ModelExportError
        If the file does not run, or computes something else.
    """
    if importlib.util.find_spec("onnxruntime") is None:
        return None
    import onnxruntime

    image = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = [tensor.numpy() for _, tensor in flatten_result("", model(image))]
    try:
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        got = session.run(None, {session.get_inputs()[0].name: image.numpy()})
    except Exception as error:  # ONNX Runtime raises a dozen types of its own
        raise ModelExportError("ONNX Runtime cannot run the file", got=str(error)) from error
    difference = max(
        float(np.abs(ours - reference).max() / np.abs(reference).max())
        for ours, reference in zip(got, expected, strict=True)
    )
    if not difference < _TOLERANCE:
        raise ModelExportError(
            f"{path} computes something else than the model",
            got=f"a difference of {difference:.1e} of the largest value in ONNX Runtime",
            allowed=f"{_TOLERANCE:g}",
        )
    return difference
