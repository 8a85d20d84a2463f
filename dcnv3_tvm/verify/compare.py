"""Compare a compiled model with PyTorch in float64 and the NumPy reference operator."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from dcnv3_tvm.frontend.models.internimage import InternImage
from dcnv3_tvm.frontend.torch.entry_points import flatten_result
from dcnv3_tvm.op.reference import dcnv3_reference
from dcnv3_tvm.runtime import CompiledModel
from dcnv3_tvm.spec import DCNv3Spec
from dcnv3_tvm.verify.entries import entry_outputs
from dcnv3_tvm.verify.tolerances import NORM_ERROR, model_tolerance


@dataclasses.dataclass(frozen=True)
class Difference:
    """Error of one output.

    Parameters
    ----------
    output : str
        Name of the entry and the output.
    maximum, mean : float
        Maximum and mean absolute error, divided by `scale`; NaN if an element is not finite.
    norm : float
        Relative L2 error.
    scale : float
        Largest absolute value of the reference.
    """

    output: str
    maximum: float
    mean: float
    norm: float
    scale: float

    def within(self, dtype: str) -> bool:
        """Whether the error is within the tolerance of a model compiled for `dtype`."""
        measure, bound = model_tolerance(dtype)
        return (self.norm if measure == NORM_ERROR else self.maximum) <= bound


class ReferenceOperator(TorchFunctionMode):
    """Context in which ``torch.ops.dcnv3_tvm.dcnv3`` is the float64 NumPy reference."""

    def __torch_function__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func not in (torch.ops.dcnv3_tvm.dcnv3, torch.ops.dcnv3_tvm.dcnv3.default):
            return func(*args, **(kwargs or {}))
        x, offset, mask = args
        spec = DCNv3Spec.of(x.shape, dtype="float64", **(kwargs or {}))
        result = dcnv3_reference(x.numpy(), offset.numpy(), mask.numpy(), spec)
        return torch.from_numpy(result).to(x.dtype)


def reference_outputs(
    model: nn.Module, inputs: np.ndarray | tuple[np.ndarray, ...]
) -> dict[str, list[np.ndarray]]:
    """Run a model in float64; this library's operator is the NumPy reference.

    Parameters
    ----------
    model : nn.Module
        Unchanged.
    inputs : numpy.ndarray or tuple of numpy.ndarray
        An NCHW batch, or all inputs of the model.

    Returns
    -------
    dict of str to list of numpy.ndarray
        Outputs of the entry ``"main"``, and of ``"features"`` for an InternImage.
    """
    with ReferenceOperator():
        return pytorch_outputs(model, inputs, torch.float64)


def pytorch_outputs(
    model: nn.Module, inputs: np.ndarray | tuple[np.ndarray, ...], dtype: torch.dtype
) -> dict[str, list[np.ndarray]]:
    """Run a model eagerly with all weights and floating-point tensors in one type.

    Parameters
    ----------
    model : nn.Module
        Unchanged.
    inputs : numpy.ndarray or tuple of numpy.ndarray
        As for `reference_outputs`.
    dtype : torch.dtype
        Type of weights and activations.

    Returns
    -------
    dict of str to list of numpy.ndarray
        Outputs of the entry ``"main"``, and of ``"features"`` for an InternImage, in float64.
    """
    model = copy.deepcopy(model).to(dtype)
    arrays = inputs if isinstance(inputs, tuple) else (inputs,)
    given = map(torch.from_numpy, arrays)
    tensors = [each.to(dtype) if each.is_floating_point() else each for each in given]
    with torch.no_grad():
        outputs = {"main": model(*tensors)}
        if isinstance(model, InternImage):
            outputs["features"] = model.forward_pyramid(*tensors)
    return {
        entry: [_array(tensor) for _, tensor in flatten_result("", result)]
        for entry, result in outputs.items()
    }


def compare(
    compiled: CompiledModel,
    model: nn.Module,
    inputs: np.ndarray | tuple[np.ndarray, ...],
    reference: dict[str, list[np.ndarray]] | None = None,
) -> list[Difference]:
    """Compare all outputs of all entries for one batch.

    Parameters
    ----------
    compiled : CompiledModel
        The model under test.
    model : nn.Module
        The PyTorch model with the same weights, in inference mode.
    inputs : numpy.ndarray or tuple of numpy.ndarray
        An NCHW batch in the input dtype of the compiled model, or all inputs by position.
    reference : dict of str to list of numpy.ndarray, optional
        Result of `reference_outputs` for the same model and batch, if already computed.
    """
    expected = reference or reference_outputs(model, inputs)
    found = entry_outputs(compiled, *(inputs if isinstance(inputs, tuple) else (inputs,)))
    return [
        difference(f"{entry}/{tensor.name}", ours, theirs)
        for entry, info in compiled.metadata.entries.items()
        if entry in expected
        for tensor, ours, theirs in zip(info.outputs, found[entry], expected[entry], strict=True)
    ]


def difference(name: str, output: np.ndarray, expected: np.ndarray) -> Difference:
    """Compute the error of an output."""
    if output.shape != expected.shape:
        return Difference(f"{name} {output.shape}", *[float("nan")] * 4)
    scale = float(np.abs(expected).max())
    errors = np.abs(output.astype(np.float64) - expected) / (scale or 1.0)
    norm = float(np.linalg.norm(errors) / (np.linalg.norm(expected / (scale or 1.0)) or 1.0))
    return Difference(name, float(errors.max()), float(errors.mean()), norm, scale)


def _array(tensor: Tensor) -> np.ndarray:
    return np.ascontiguousarray(tensor.double().numpy())
