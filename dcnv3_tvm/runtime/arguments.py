"""Inputs of a compiled model: check them against its signature and convert them."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from dcnv3_tvm import gpu
from dcnv3_tvm.errors import InvalidArgumentError
from dcnv3_tvm.runtime import tensors
from dcnv3_tvm.runtime.cuda import Gpu
from dcnv3_tvm.runtime.metadata import wrong_size
from dcnv3_tvm.signature import BATCH, Entry, TensorInfo, parse_size


def in_order(
    values: Sequence[Any], named: Mapping[str, Any], infos: Sequence[TensorInfo]
) -> list[Any]:
    """Return inputs given by position and by name, in the order of the signature.

    Raises
    ------
    InvalidArgumentError
        If an input is missing, unknown or given twice.
    """
    names = [info.name for info in infos[len(values) :]]
    if len(values) > len(infos) or named.keys() != set(names):
        raise InvalidArgumentError(
            "wrong number or names of inputs",
            got=", ".join([f"{len(values)} by position", *named]),
            allowed=f"{len(infos)}: {', '.join(info.name for info in infos)}",
        )
    return [*values, *(named[name] for name in names)]


def choose_entry(entries: Mapping[str, Entry], image: Any) -> str:
    """Return the name of the entry that takes an image of this size.

    Parameters
    ----------
    entries : mapping of str to Entry
        Those of one function, one for each image size.
    image : object
        The first input.

    Raises
    ------
    InvalidArgumentError
        If it is an image of another size.
    """
    first = next(iter(entries))
    info = entries[first].inputs[0]
    shape = _describe(image, info).shape
    if len(shape) != len(info.shape):
        return first  # It says what is wrong.
    height, width = (shape[axis] for axis in info.spatial_axes)
    sizes = {name: entry.inputs[0].image_size for name, entry in entries.items()}
    for name, size in sizes.items():
        if size == (height, width):
            return name
    channel = info.layout.index("C") if info.layout else 1
    if shape[channel] != info.shape[channel] or not (height and width):
        return first
    raise wrong_size((height, width), [size for size in sizes.values() if size is not None])


class Arguments:
    """The inputs of a call, checked against the signature of the compiled function.

    Parameters
    ----------
    values : sequence of numpy.ndarray, torch.Tensor or tvm_ffi.Tensor
        One for each of `infos`, contiguous or not. The batch may be empty where it is dynamic.
    infos : sequence of TensorInfo
        Inputs of the compiled function.
    device : Gpu, optional
        The GPU the function runs on; the CPU by default. For a GPU all values are of one kind:
        NumPy arrays, which are copied to it, or tensors that it holds.

    Raises
    ------
    InvalidArgumentError
        If the kind, dtype, rank, layout, size or device of a value is wrong.
    """

    def __init__(
        self, values: Sequence[Any], infos: Sequence[TensorInfo], device: Gpu | None = None
    ) -> None:
        self._device = device
        self._infos = infos
        self._inputs = [_describe(value, info) for value, info in zip(values, infos, strict=True)]
        sizes: dict[str, int] = {}
        for each, info in zip(self._inputs, infos, strict=True):
            _check_device(each, info.name, device)
            _check(each, info, sizes)
        self._is_empty = sizes.get(BATCH) == 0
        if self._is_empty:
            # Kernels need at least one image, whose result is dropped.
            self._inputs = list(map(_with_one_image, self._inputs, infos))
        kinds = [each.kind for each in self._inputs]
        if device is not None and len(set(kinds)) > 1:
            raise InvalidArgumentError(
                "the inputs are of different kinds",
                got=", ".join(kinds),
                allowed="all of one kind",
            )

    @functools.cached_property
    def stream(self) -> int:
        """The caller's current CUDA stream, as a handle; the default stream for NumPy arrays."""
        first = self._inputs[0]
        if self._device is None or first.kind == "numpy":
            return 0
        return self._device.stream_of(first.value)

    def to_kernel(self, buffers: list[Any]) -> list[Any]:
        """Return TVM tensors on the device, sharing the memory of the values where possible.

        Parameters
        ----------
        buffers : list of tvm_ffi.Tensor
            Copies on the GPU made by the previous call, reused where they fit; modified.
        """
        values = [each.value for each in self._inputs]
        if self._device is None:
            converted = [tensors.to_kernel(value, tensors.ALIGNMENT) for value in values]
        elif self._inputs[0].kind != "numpy":
            converted = [tensors.to_kernel(value, gpu.VECTOR_BYTES) for value in values]
        else:
            buffers.extend([None] * (len(values) - len(buffers)))
            for index, value in enumerate(values):
                buffers[index] = self._device.upload(tensors.to_kernel(value), into=buffers[index])
            converted = buffers
        return list(map(_kernel_view, converted, self._infos))

    def from_kernel(self, tensor: Any, info: TensorInfo) -> Any:
        """Convert a result to the kind of the first input, sharing its memory where possible."""
        result = self._converted(tensor)
        if not self._is_empty:
            return result
        sizes = zip(tensors.shape_of(result), info.shape, strict=True)
        return tensors.empty_like(
            result, [0 if _depends_on_batch(expected) else size for size, expected in sizes]
        )

    def _converted(self, tensor: Any) -> Any:
        kind = self._inputs[0].kind
        if kind == "numpy" and self._device is not None:
            buffer = tensors.aligned_bytes(tensors.total_bytes([tensor]))
            self._device.download(tensor, buffer, self.stream)
            tensor = tensors.view(buffer, tensor.shape, str(tensor.dtype))
        return tensors.from_kernel(tensor, kind)


class _Input(NamedTuple):
    value: Any
    kind: str
    shape: tuple[int, ...]
    dtype: str


def _describe(value: Any, info: TensorInfo) -> _Input:
    hint = "For an image file or a PIL image, call model.preprocess(image) first."
    kind = tensors.kind_of(info.name, value, hint=hint)
    return _Input(value, kind, tensors.shape_of(value), tensors.dtype_of(value))


def _with_one_image(given: _Input, info: TensorInfo) -> _Input:
    """Replace an input of an empty batch by zeros for one image."""
    shape = tuple(
        1 if expected == BATCH else size
        for size, expected in zip(given.shape, info.shape, strict=True)
    )
    return given._replace(value=tensors.zeros_like(given.value, shape), shape=shape)


def _depends_on_batch(size: int | str) -> bool:
    return isinstance(size, str) and BATCH in re.findall(r"\w+", size)


def _kernel_view(tensor: Any, info: TensorInfo) -> Any:
    shape = info.kernel_shape(tensors.shape_of(tensor))
    if len(shape) == len(info.shape):
        return tensor
    return tensors.view(tensor, [int(size) for size in shape], str(tensor.dtype))


def _check_device(given: _Input, name: str, device: Gpu | None) -> None:
    expected = tensors.CPU if device is None else device.name
    actual = tensors.device_of(given.value)
    if given.kind == "numpy" or actual == expected:
        return
    hint = None
    if given.kind == "torch":
        hint = "Use x.cpu()." if device is None else f'Use x.to("{expected}").'
    raise InvalidArgumentError(
        f"{name} is not on the model's device",
        got=f"a tensor on {actual}",
        allowed=expected,
        hint=hint,
    )


def _check(given: _Input, info: TensorInfo, sizes: dict[str, int]) -> None:
    """Check dtype and shape; `sizes` holds the values of dynamic sizes seen so far."""
    if given.dtype != info.dtype:
        raise InvalidArgumentError(
            f"{info.name} has the wrong element type",
            got=given.dtype,
            allowed=info.dtype,
            hint=_dtype_hint(given, info),
        )
    if len(given.shape) != len(info.shape):
        raise InvalidArgumentError(
            f"{info.name} has the wrong number of dimensions",
            got=f"shape {given.shape}",
            allowed=info.describe(),
            hint=_rank_hint(given, info),
        )
    if any(
        size == 0 and expected != BATCH
        for size, expected in zip(given.shape, info.shape, strict=True)
    ):
        raise InvalidArgumentError(
            f"{info.name} is empty", got=f"shape {given.shape}", allowed=info.describe()
        )
    if not _matches(given.shape, info.shape):
        raise InvalidArgumentError(
            f"{info.name} has the wrong shape",
            got=f"shape {given.shape}",
            allowed=info.describe(),
            hint=_shape_hint(given, info),
        )
    for axis, (size, expected) in enumerate(zip(given.shape, info.shape, strict=True)):
        if not isinstance(expected, str):
            continue
        multiple, name = parse_size(expected)
        if size % multiple:
            raise InvalidArgumentError(
                f"axis {axis} of {info.name} is not a multiple of {multiple}",
                got=f"shape {given.shape}",
                allowed=f"{info.describe()}, with any {name}",
                hint=f"Resize or pad the image to multiples of {multiple}.",
            )
        if sizes.setdefault(expected, size) != size:
            raise InvalidArgumentError(
                f"axis {axis} of {info.name} differs from another axis of size {expected!r}",
                got=size,
                allowed=sizes[expected],
            )


def _matches(shape: Sequence[int], expected: Sequence[int | str]) -> bool:
    return all(
        isinstance(wanted, str) or size == wanted
        for size, wanted in zip(shape, expected, strict=True)
    )


def _dtype_hint(given: _Input, info: TensorInfo) -> str | None:
    if given.dtype == "uint8" and info.layout:
        return "For an image of bytes, call model.preprocess(image) first."
    if given.kind == "torch":
        return f"Use x.to(torch.{info.dtype})."
    return f"Use x.astype({info.dtype!r})." if given.kind == "numpy" else None


def _rank_hint(given: _Input, info: TensorInfo) -> str | None:
    if len(given.shape) + 1 == len(info.shape) and info.layout.startswith("N"):
        return "Add a batch axis: x[None]."
    return None


def _shape_hint(given: _Input, info: TensorInfo) -> str | None:
    orders = {"NCHW": (0, 3, 1, 2), "NHWC": (0, 2, 3, 1)}
    order = orders.get(info.layout)
    if order is not None:
        channel = info.layout.index("C")
        permuted = [given.shape[axis] for axis in order]
        if given.shape[channel] != info.shape[channel] == permuted[channel]:
            other = "NHWC" if info.layout == "NCHW" else "NCHW"
            method = "permute" if given.kind == "torch" else "transpose"
            return f"This looks like {other}, and {info.layout} is expected: use x.{method}{order}."
    if info.layout.startswith("N") and _matches(given.shape[1:], info.shape[1:]):
        return "Compile with this batch size (--batch N) or a dynamic one (--dynamic-batch)."
    if info.layout:
        return "Call model.preprocess(image) for this size, or compile for another (--size HxW)."
    return None
