"""The calls of a PyTorch model that become Relax functions."""

from __future__ import annotations

import dataclasses
import os
import traceback
from collections.abc import Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

from dcnv3_tvm.errors import ModelImportError
from dcnv3_tvm.frontend.torch.model_inputs import ModelInputs

PYRAMID_METHODS: Final = {"forward_pyramid": "NCHW", "forward_features_seq_out": "NHWC"}
"""Methods that return the feature maps of all stages, and the layout of these maps.

The first is this library's, the second the published one.
"""

MODEL_PREFIX: Final = "model."
"""What `EntryPoint` adds to the names of modules and parameters."""

_PYRAMID_OWNERS: Final = ("", "model", "backbone", "encoder")


class _OutputNames:
    """Keeps names through torch.export, which restores plain attributes of a module."""

    value: Sequence[str] = ()


class EntryPoint(nn.Module):
    """A call of a model that returns a flat tuple of tensors and records their names.

    Parameters
    ----------
    model : nn.Module
        The model, prepared for export.
    inputs : ModelInputs
        Its inputs.
    owner, method : str
        Submodule and method to call; by default the model itself.
    """

    def __init__(
        self, model: nn.Module, inputs: ModelInputs, owner: str = "", method: str = ""
    ) -> None:
        super().__init__()
        self.model = model
        self.inputs = inputs
        self.owner = owner
        self.method = method
        self.training = False
        self._output_names = _OutputNames()

    @property
    def output_names(self) -> Sequence[str]:
        """Path of each returned tensor in the model's result; known after the export."""
        return self._output_names.value

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Return the tensors of the model's result in order."""
        call = self.model
        if self.method:
            call = getattr(self.model.get_submodule(self.owner), self.method)
        try:
            outputs = self.inputs.call(call, tensors)
        except GuardOnDataDependentSymNode as error:
            # Raised here: torch.export would print the whole graph before it raises its own error.
            raise ModelImportError(
                "the model takes a decision by the values of a tensor",
                got=_user_line(error),
                hint="Express it with torch.where, or store the value as a Python number.",
            ) from error
        if self.method and PYRAMID_METHODS[self.method] == "NHWC":
            outputs = [feature.permute(0, 3, 1, 2) for feature in outputs]
        flat = flatten_result("", outputs)
        self._output_names.value = [name for name, _ in flat]
        return tuple(tensor for _, tensor in flat)


def find_pyramid(model: nn.Module, inputs: ModelInputs) -> EntryPoint | None:
    """Return the call that computes the feature pyramid of an image, if the model has one."""
    if [len(info.shape) for info in inputs.infos] != [4]:
        return None
    for method in PYRAMID_METHODS:
        for owner in _PYRAMID_OWNERS:
            part = getattr(model, owner, None) if owner else model
            if isinstance(part, nn.Module) and callable(getattr(part, method, None)):
                return EntryPoint(model, inputs, owner, method)
    return None


def flatten_result(path: str, value: Any) -> list[tuple[str, Tensor]]:
    """Return each tensor of a nested result with its path, without None."""
    if value is None:
        return []
    if isinstance(value, Tensor):
        return [(path, value)]
    items: list[tuple[Any, Any]]
    if isinstance(value, Mapping):
        items = list(value.items())
    elif isinstance(value, (list, tuple)):
        items = list(zip(getattr(value, "_fields", range(len(value))), value, strict=True))
    elif dataclasses.is_dataclass(value):
        items = [(f.name, getattr(value, f.name)) for f in dataclasses.fields(value)]
    else:
        raise ModelImportError(
            "the model returns a value that is not a tensor",
            got=f"{path or 'result'}: {type(value).__name__}",
            allowed="tensors, and tuples, lists, dictionaries and dataclasses of tensors",
        )
    flat = []
    for key, item in items:
        flat += flatten_result(f"{path}.{key}" if path else str(key), item)
    return flat


def _user_line(error: BaseException) -> str:
    """Return the innermost line of the model's source that an error has passed."""
    libraries = (os.path.dirname(torch.__file__), os.path.dirname(__file__))
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith(libraries)
    ]
    return f"{frames[-1].filename}, line {frames[-1].lineno}: {frames[-1].line}"
