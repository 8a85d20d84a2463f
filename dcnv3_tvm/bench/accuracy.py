"""Errors of a backend's outputs, computed on the device that holds them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from dcnv3_tvm.verify.tolerances import NORM_ERROR

_CHUNK = 8
"""Images compared at once, which bounds the memory of the float64 differences."""


def largest_error(outputs: Sequence[Any], references: Sequence[Any], measure: str) -> float:
    """Return the largest error over all outputs.

    Parameters
    ----------
    outputs, references : sequence of numpy.ndarray or torch.Tensor
        Outputs and their references, on the same device.
    measure : str
        `dcnv3_tvm.verify.tolerances.MAX_ERROR` or `NORM_ERROR`.

    Returns
    -------
    float
        NaN if the number of outputs or a shape differs, or an element is NaN.
    """
    if len(outputs) != len(references):
        return float("nan")
    errors = [
        _error(torch.as_tensor(output), torch.as_tensor(reference), measure)
        for output, reference in zip(outputs, references, strict=True)
    ]
    return max(errors, key=lambda error: (error != error, error))


def _error(output: torch.Tensor, reference: torch.Tensor, measure: str) -> float:
    if output.shape != reference.shape:
        return float("nan")
    error, scale = reference.new_zeros(()), reference.new_zeros(())
    for start in range(0, len(reference), _CHUNK):
        expected = reference[start : start + _CHUNK]
        difference = output[start : start + _CHUNK].to(expected.dtype) - expected
        if measure == NORM_ERROR:
            error, scale = error + difference.square().sum(), scale + expected.square().sum()
        else:
            error = torch.maximum(error, difference.abs().amax())
            scale = torch.maximum(scale, expected.abs().amax())
    ratio = float(error) / (float(scale) or 1.0)
    return ratio**0.5 if measure == NORM_ERROR else ratio
