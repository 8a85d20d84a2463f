"""What of a PyTorch model becomes a Relax function, and what its inputs and outputs are called."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any, Final

import tvm
from torch import Tensor, nn
from tvm import relax, tirx

from dcnv3_tvm.errors import ModelImportError
from dcnv3_tvm.signature import TensorInfo

PYRAMID_METHODS: Final = {"forward_pyramid": "NCHW", "forward_features_seq_out": "NHWC"}
"""Methods that return the maps of all stages (this library's, the published one), and in which
layout they do."""

MODEL_PREFIX: Final = "model."
"""What `EntryPoint` puts in front of the names of modules and parameters."""

_IMAGE: Final = "image"
_OWNERS: Final = ("", "model", "backbone", "encoder")


class _Recorded:
    """What a module remembers across torch.export, which restores its plain attributes."""

    names: Sequence[str] = ()


class EntryPoint(nn.Module):
    """A call of a model that returns nothing but tensors, and remembers their names.

    Parameters
    ----------
    model : nn.Module
        The model, prepared for export.
    owner, method : str
        Submodule and method to call instead of the model itself.
    """

    def __init__(self, model: nn.Module, owner: str = "", method: str = "") -> None:
        super().__init__()
        self.model = model
        self.owner = owner
        self.method = method
        self.recorded = _Recorded()
        self.training = False

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """Return the tensors of the result in order."""
        if not self.method:
            outputs = self.model(image)
        else:
            outputs = getattr(self.model.get_submodule(self.owner), self.method)(image)
            if PYRAMID_METHODS[self.method] == "NHWC":
                outputs = [feature.permute(0, 3, 1, 2) for feature in outputs]
        flat = _flatten("", outputs)
        self.recorded.names = [name for name, _ in flat]
        return tuple(tensor for _, tensor in flat)


def pyramid_of(model: nn.Module) -> EntryPoint | None:
    """Return the call that gives the feature pyramid, if the model offers one."""
    for method in PYRAMID_METHODS:
        for owner in _OWNERS:
            part = getattr(model, owner, None) if owner else model
            if isinstance(part, nn.Module) and callable(getattr(part, method, None)):
                return EntryPoint(model, owner, method)
    return None


def _flatten(path: str, value: Any) -> list[tuple[str, Tensor]]:
    """Return every tensor of a nested result with its path; None is left out."""
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
            "the model returns something that is no tensor",
            got=f"{path or 'result'}: {type(value).__name__}",
            allowed="tensors, and tuples, lists, dictionaries and dataclasses of tensors",
        )
    flat = []
    for key, item in items:
        flat += _flatten(f"{path}.{key}" if path else str(key), item)
    return flat


def describe_input(function: relax.Function) -> TensorInfo:
    """Describe the image, which is the function's first parameter."""
    image = function.params[0].ty
    return TensorInfo(_IMAGE, _shape(image), str(image.dtype.dtype), "NCHW")


def describe_outputs(
    names: Sequence[str], function: relax.Function, image: Sequence[int]
) -> tuple[TensorInfo, ...]:
    """Describe what a function returns.

    Parameters
    ----------
    names : sequence of str
        Paths of the tensors in the PyTorch result.
    function : relax.Function
        Takes an image (N, 3, H, W) first.
    image : sequence of int
        Shape of the example: sizes for it tell maps from other tensors.

    Raises
    ------
    ModelImportError
        If Relax knows no shape for an output.
    """
    outputs = function.ret_ty.fields
    for name, output in zip(names, outputs, strict=True):
        if output.shape is None:
            raise ModelImportError(
                "the shape of an output is not known",
                got=f"output {name or 0!r} where the image has the shape {tuple(image)}",
                hint="Something that the model makes for one size (linspace, a slice up to a "
                "number) meets a size that was left open: import it with fixed sizes.",
            )
    sizes = [_sizes(output, function.params[0].ty, image) for output in outputs]
    pyramid = _is_pyramid(sizes, image)
    return tuple(
        TensorInfo(
            _name(name, output.ndim, pyramid),
            _shape(output),
            str(output.dtype.dtype),
            *_layout_and_stride(size, image, pyramid),
        )
        for name, output, size in zip(names, outputs, sizes, strict=True)
    )


def is_pyramid(outputs: Sequence[TensorInfo]) -> bool:
    """Tell whether outputs are feature maps (N, C, H', W') and nothing else."""
    return all(output.layout == "NCHW" and output.stride for output in outputs)


def _is_pyramid(sizes: list[list[int]], image: Sequence[int]) -> bool:
    return all(len(size) == 4 and _stride(size[2:], image) for size in sizes)


def _shape(tensor: relax.TensorType) -> tuple[int | str, ...]:
    return tuple(
        int(dim.value)
        if isinstance(dim, tirx.IntImm)
        else re.sub(r"T\.int64\((-?\d+)\)", r"\1", str(dim))
        for dim in tensor.shape.values
    )


def _sizes(output: relax.TensorType, given: relax.TensorType, image: Sequence[int]) -> list[int]:
    """Return the sizes of an output for the example."""
    analyzer = tvm.sym.Analyzer()
    for dim, size in zip(given.shape.values, image, strict=True):
        if isinstance(dim, tirx.Var):
            analyzer.bind(dim, tirx.IntImm("int64", size))
    return [int(analyzer.simplify(dim).value) for dim in output.shape.values]


def _name(path: str, rank: int, pyramid: bool) -> str:
    if pyramid and (not path or path.isdecimal()):
        return f"feature_{path or 0}"
    if not path:
        return "logits" if rank == 2 else "output"
    return f"output_{path}" if path.isdecimal() else path


def _layout_and_stride(
    size: list[int], image: Sequence[int], pyramid: bool
) -> tuple[str, int | None]:
    if len(size) != 4:
        return "", None
    readings = {"NCHW": _stride(size[2:], image), "NHWC": _stride(size[1:3], image)}
    fitting = [(layout, stride) for layout, stride in readings.items() if stride]
    # Where both readings fit (as many channels as pixels), a pyramid is NCHW.
    return fitting[0] if len(fitting) == 1 or (pyramid and fitting) else ("", None)


def _stride(size: list[int], image: Sequence[int]) -> int | None:
    """Return the power of two by which a map of (height, width) is smaller than the image."""
    height, width = image[2:]
    stride = 1
    while [height, width] != size:
        if height == width == 1:
            return None
        height, width = (height + 1) // 2, (width + 1) // 2
        stride *= 2
    return stride
