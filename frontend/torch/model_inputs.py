"""The inputs of a model: how ``forward`` takes them, with an example, name and sizes of each."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from dcnv3_tvm.errors import InvalidArgumentError, ModelImportError
from dcnv3_tvm.signature import BATCH, TensorInfo, input_layout, parse_size

Example: TypeAlias = "Tensor | np.ndarray | Sequence[Any] | Mapping[str, Any]"
"""An input is a tensor, a shape, or a list, tuple or dict of these. A tuple at the top holds
several inputs by position, a dict at the top by parameter."""

_DTYPES: Final = (
    *(torch.float32, torch.bool, torch.uint8),
    *(torch.int8, torch.int16, torch.int32, torch.int64),
)

_FORMS: Final = (
    "a tensor or a shape such as (1, 3, 224, 224); a tuple of these for several inputs; a dict of "
    "these by parameter; a list of tensors where an input is a list"
)

_WRAP: Final = (
    "Wrap a model that takes more than tensors in a module with, for example, def forward(self, "
    "image): return self.model.forward_dummy(image); or import the part that takes only images, "
    "for example model.backbone."
)


_NOT_SIZES: Final = (bool, np.bool_, np.ndarray, Tensor)

_IMAGE_RANK: Final = 4
"""Inputs with as many axes or more have a height and a width."""


@dataclasses.dataclass(frozen=True)
class ModelInputs:
    """The tensors that ``forward`` takes.

    Parameters
    ----------
    infos : tuple of TensorInfo
        Name, shape and dtype of each tensor, in the order of the parameters.
    given : tuple of TensorInfo
        The same with the sizes of the example.
    examples : tuple of Tensor
        One for each, in its `TensorInfo.kernel_shape`; dynamic sizes of one are doubled.
    signature : inspect.Signature
        Of ``forward``.
    arguments : dict
        The arguments by parameter, with None for each tensor.
    """

    infos: tuple[TensorInfo, ...]
    given: tuple[TensorInfo, ...]
    examples: tuple[Tensor, ...]
    signature: inspect.Signature
    arguments: dict[str, Any]

    @classmethod
    def of(
        cls, module: nn.Module, example: Example, *, dynamic_batch: bool, multiple: int
    ) -> ModelInputs:
        """Describe the inputs of a model by an example.

        Parameters
        ----------
        module : nn.Module
            The model.
        example : tensor, sequence or mapping
            As for `import_model`.
        dynamic_batch : bool
            Whether the size of the first axis is dynamic.
        multiple : int
            What dynamic heights and widths are multiples of; 0 for fixed ones.

        Raises
        ------
        InvalidArgumentError
            If the example is invalid.
        ModelImportError
            If ``forward`` does not take such inputs.
        """
        signature, parameters = _bind(module, example)
        weight = next(module.parameters(), None)
        device = torch.device("cpu") if weight is None else weight.device
        tensors: dict[str, Tensor] = {}

        def collect(path: str, value: Any) -> None:
            tensors[path] = _tensor(path, value).to(device)

        arguments = {name: _map(name, value, collect) for name, value in parameters.items()}
        if not tensors:
            raise InvalidArgumentError("the example is empty", got=example, allowed=_FORMS)
        if len(tensors) == 1 and next(iter(tensors.values())).ndim == 4:
            tensors = {"image": next(iter(tensors.values()))}
        given = tuple(_info(name, tensor) for name, tensor in tensors.items())
        infos = _with_dynamic_sizes(given, dynamic_batch=dynamic_batch, multiple=multiple)
        examples = (
            _split(_enlarged(tensor, info), info)
            for tensor, info in zip(tensors.values(), infos, strict=True)
        )
        return cls(infos, given, tuple(examples), signature, arguments)

    @property
    def sizes(self) -> dict[str, int]:
        """The examples' dynamic sizes by name; those that are multiples, divided."""
        return {
            name: size
            for info, example in zip(self.infos, self.examples, strict=True)
            for name, size in zip(info.kernel_shape(info.shape), example.shape, strict=True)
            if isinstance(name, str)
        }

    @property
    def spatial_size(self) -> tuple[int, int] | None:
        """Height and width of the first example that has them."""
        for info, example in zip(self.infos, self.examples, strict=True):
            if len(info.shape) >= _IMAGE_RANK:
                shape = _merged(example, info).shape
                height, width = (shape[axis] for axis in info.spatial_axes)
                return height, width
        return None

    def call(self, function: Callable[..., Any], tensors: Sequence[Tensor]) -> Any:
        """Call a function that takes the arguments of ``forward``, with other tensors."""
        remaining = iter(map(_merged, tensors, self.infos))
        arguments = {
            name: _map(name, value, lambda *_: next(remaining))
            for name, value in self.arguments.items()
        }
        bound = inspect.BoundArguments(self.signature, arguments)
        return function(*bound.args, **bound.kwargs)


def _bind(module: nn.Module, example: Example) -> tuple[inspect.Signature, dict[str, Any]]:
    """Return the signature of ``forward``, and the example of each parameter."""
    signature = inspect.signature(module.forward)
    by_name = example if isinstance(example, Mapping) else {}
    several = isinstance(example, tuple) and not _is_shape(example)
    by_position = () if by_name else tuple(example) if several else (example,)
    try:
        bound = signature.bind(*by_position, **by_name)
    except TypeError as error:
        raise ModelImportError(
            "the model's forward does not take the inputs of the example, or takes others too",
            got=f"forward{signature}: {error}",
            allowed=f"example: {_FORMS}",
            hint=_WRAP,
        ) from error
    return signature, dict(bound.arguments)


def _map(path: str, value: Any, convert: Callable[[str, Any], Any]) -> Any:
    """Convert each tensor or shape in nested sequences and mappings."""
    if isinstance(value, Mapping):
        return {key: _map(f"{path}.{key}", item, convert) for key, item in value.items()}
    if isinstance(value, list | tuple) and not _is_shape(value):
        items = [_map(f"{path}.{index}", item, convert) for index, item in enumerate(value)]
        return items if isinstance(value, list) else tuple(items)
    return convert(path, value)


def _is_shape(value: Any) -> bool:
    """Whether a value is a shape: integers, in a sequence or a NumPy vector."""
    if isinstance(value, np.ndarray):
        return value.ndim == 1 and value.dtype.kind in "iu"
    return (
        isinstance(value, list | tuple)
        and bool(value)
        and all(hasattr(size, "__index__") and not isinstance(size, _NOT_SIZES) for size in value)
    )


def _tensor(name: str, value: Any) -> Tensor:
    """Return an example as a tensor; zeros for a shape."""
    if _is_shape(value):
        shape = tuple(int(size) for size in value)
        _check_sizes(name, shape)
        try:
            return torch.zeros(shape, dtype=torch.float32)
        except RuntimeError as error:
            raise InvalidArgumentError(
                f"the example of {name} does not fit into memory", got=f"shape {shape}"
            ) from error
    if isinstance(value, np.ndarray) and value.dtype.kind in "fiub":
        value = torch.from_numpy(np.array(value, value.dtype.newbyteorder("=")))
    if not isinstance(value, Tensor):
        raise InvalidArgumentError(
            f"the example of {name} is not a tensor",
            got=type(value).__name__,
            allowed=_FORMS,
            hint=_WRAP,
        )
    if value.layout is not torch.strided or value.is_meta:
        raise InvalidArgumentError(
            f"the example of {name} has no values in memory, or not all of them",
            got=f"device {value.device}, layout {value.layout}",
            allowed="a dense tensor on a CPU or GPU",
        )
    if value.dtype not in _DTYPES:
        raise InvalidArgumentError(
            f"the example of {name} has another dtype than the model",
            got=str(value.dtype),
            allowed="torch.float32, a boolean or an integer type",
            hint="Use image.float(), normalised as the model expects it.",
        )
    _check_sizes(name, tuple(value.shape))
    return value.detach()


def _check_sizes(name: str, shape: tuple[int, ...]) -> None:
    if not all(size > 0 for size in shape):
        raise InvalidArgumentError(
            f"the example of {name} is empty", got=f"shape {shape}", allowed="sizes of 1 or more"
        )


def _info(name: str, tensor: Tensor) -> TensorInfo:
    shape = tuple(tensor.shape)
    dtype = str(tensor.dtype).removeprefix("torch.")
    return TensorInfo(name, shape, dtype, input_layout(shape))


def _with_dynamic_sizes(
    infos: Sequence[TensorInfo], *, dynamic_batch: bool, multiple: int
) -> tuple[TensorInfo, ...]:
    """Replace sizes by names; equal heights have one name, and so have equal widths."""
    batches = {info.name: info.shape[0] for info in infos if info.shape}
    if dynamic_batch and len(set(batches.values())) != 1:
        raise InvalidArgumentError(
            "dynamic_batch needs inputs of one batch size",
            got=", ".join(f"{name}: {size}" for name, size in batches.items()) or "no batch axis",
            allowed="the same size of the first axis in all examples",
        )
    names: dict[tuple[str, int], str] = {}

    def dynamic(letter: str, size: int) -> str:
        if size % multiple:
            raise InvalidArgumentError(
                "the size of the example is not a multiple of dynamic_size",
                got=f"{letter}={size}, dynamic_size={multiple}",
                allowed=f"multiples of {multiple}",
            )
        used = sum(each == letter for each, _ in names)
        name = names.setdefault((letter, size), f"{letter}_{used}" if used else letter)
        return f"{multiple}*{name}" if multiple > 1 else name

    described = []
    for info in infos:
        shape = list(info.shape)
        if multiple and len(shape) >= _IMAGE_RANK:
            for letter, axis in zip("hw", info.spatial_axes, strict=True):
                shape[axis] = dynamic(letter, int(shape[axis]))
        if dynamic_batch and shape:
            shape[0] = BATCH
        described.append(dataclasses.replace(info, shape=tuple(shape)))
    return tuple(described)


def _enlarged(tensor: Tensor, info: TensorInfo) -> Tensor:
    """Double the dynamic sizes that are one, on which torch.export would specialise."""
    for axis, size in enumerate(info.shape):
        if isinstance(size, str) and tensor.shape[axis] == parse_size(size)[0]:
            tensor = torch.cat([tensor, tensor], axis)
    return tensor


def _split(tensor: Tensor, info: TensorInfo) -> Tensor:
    shape = info.kernel_shape(tensor.shape)
    return tensor if len(shape) == tensor.ndim else tensor.reshape([int(size) for size in shape])


def _merged(tensor: Tensor, info: TensorInfo) -> Tensor:
    """Undo `_split`."""
    if tensor.ndim == len(info.shape):
        return tensor
    sizes = iter(tensor.shape)
    return tensor.reshape(
        [
            next(sizes) * (next(sizes) if isinstance(size, str) and parse_size(size)[0] > 1 else 1)
            for size in info.shape
        ]
    )
