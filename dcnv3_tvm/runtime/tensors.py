"""Tensors in and out: checked against the signature, zero copy where that is safe."""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from dcnv3_tvm.errors import InvalidArgumentError
from dcnv3_tvm.gpu import VECTOR_BYTES, kernel_ready
from dcnv3_tvm.runtime.library import tvm_ffi
from dcnv3_tvm.signature import TensorInfo

if TYPE_CHECKING:
    from dcnv3_tvm.runtime.cuda import Gpu

ALIGNMENT: Final = 64
"""Bytes. Compiled code loads whole vectors from aligned addresses: anything less crashes it."""


def aligned_bytes(count: int) -> np.ndarray:
    """Return `count` uninitialised bytes whose address compiled code can take."""
    buffer = np.empty(count + ALIGNMENT, np.uint8)
    start = -buffer.ctypes.data % ALIGNMENT
    return buffer[start : start + count]


def aligned_copy(array: np.ndarray) -> np.ndarray:
    """Return a contiguous copy whose address compiled code can take."""
    copy = aligned_bytes(array.nbytes).view(array.dtype).reshape(array.shape)
    np.copyto(copy, array)
    return copy


def view(buffer: np.ndarray, shape: Sequence[int], dtype: str) -> Any:
    """Return a TVM tensor over the bytes of `buffer`, also in types NumPy does not have."""
    ffi = tvm_ffi()
    create = ffi.get_global_func("runtime.TVMTensorCreateView")
    return create(ffi.from_dlpack(buffer), ffi.Shape(tuple(shape)), ffi.dtype(dtype), 0)


class Arguments:
    """The tensors of a call, checked against its signature.

    Parameters
    ----------
    values : sequence of numpy.ndarray, torch.Tensor or tvm_ffi.Tensor
        One for each of `infos`, contiguous or not.
    infos : sequence of TensorInfo
        What the compiled function takes.
    gpu : Gpu, optional
        Where it runs; on the processor by default. There, all values are of one kind: arrays of
        NumPy, which are copied there, or tensors that are there.

    Raises
    ------
    InvalidArgumentError
        If the number, kind, type, rank, layout, size or place of the values does not fit.
    """

    def __init__(
        self, values: Sequence[Any], infos: Sequence[TensorInfo], gpu: Gpu | None = None
    ) -> None:
        if len(values) != len(infos):
            raise InvalidArgumentError(
                "wrong number of inputs",
                got=len(values),
                allowed=f"{len(infos)}: {', '.join(info.name for info in infos)}",
            )
        sizes: dict[str, int] = {}
        self._gpu = gpu
        self._arrays = [
            _Array(value, info.name, gpu) for value, info in zip(values, infos, strict=True)
        ]
        for array, info in zip(self._arrays, infos, strict=True):
            _check(array, info, sizes)
        kinds = {array.kind for array in self._arrays}
        if gpu is not None and len(kinds) > 1:
            raise InvalidArgumentError(
                "the inputs are of different kinds",
                got=", ".join(array.kind for array in self._arrays),
                allowed="all of one kind",
            )

    @functools.cached_property
    def stream(self) -> int:
        """CUDA's handle of the stream on which the caller works; its default one for NumPy's."""
        first = self._arrays[0]
        if self._gpu is None or first.kind == "numpy":
            return 0
        return self._gpu.stream_of(first.value)

    def tensors(self, buffers: list[Any]) -> list[Any]:
        """Return TVM tensors, over the memory of the values where that is possible.

        Parameters
        ----------
        buffers : list of tvm_ffi.Tensor
            What was copied to a GPU in the call before, used again where it fits; changed.
        """
        if self._gpu is None:
            return [array.tensor() for array in self._arrays]
        if self._arrays[0].kind != "numpy":
            return [array.tensor_on_gpu() for array in self._arrays]
        buffers.extend([None] * (len(self._arrays) - len(buffers)))
        for index, array in enumerate(self._arrays):
            buffers[index] = self._gpu.upload(array.tensor(), into=buffers[index])
        return list(buffers)

    def give(self, tensor: Any) -> Any:
        """Return a TVM tensor as the kind the first value has, over the same memory if it can."""
        kind = self._arrays[0].kind
        if kind == "tvm":
            return tensor
        if kind == "torch":
            return sys.modules["torch"].from_dlpack(tensor)
        if self._gpu is None:
            return to_numpy(tensor)
        buffer = aligned_bytes(total_bytes([tensor]))
        self._gpu.download(tensor, buffer, self.stream)
        return to_numpy(view(buffer, tensor.shape, str(tensor.dtype)))


class _Array:
    """One argument, of any of the three kinds."""

    def __init__(self, value: Any, name: str, gpu: Gpu | None) -> None:
        self.value = value
        if isinstance(value, np.ndarray):
            self.kind = "numpy"
        elif _is_torch(value):
            self.kind = "torch"
            _check_place(value, name, gpu)
        elif isinstance(value, tvm_ffi().Tensor):
            self.kind = "tvm"
            _check_place(value, name, gpu)
        else:
            raise InvalidArgumentError(
                f"{name} is not a tensor",
                got=f"{type(value).__module__}.{type(value).__qualname__}",
                allowed="numpy.ndarray, torch.Tensor or tvm_ffi.Tensor",
                hint="For an image file or a PIL image, call model.preprocess(image) first.",
            )
        self.shape = tuple(int(size) for size in value.shape)
        self.dtype = str(value.dtype).removeprefix("torch.")

    def tensor(self) -> Any:
        """Return the TVM tensor in CPU memory, over the same memory where possible."""
        ffi = tvm_ffi()
        if self.kind == "torch":
            source = self.value.detach().contiguous()
            if source.data_ptr() % ALIGNMENT:
                buffer = aligned_bytes(source.numel() * source.element_size())
                torch = sys.modules["torch"]
                torch.from_numpy(buffer).view(source.dtype).view(source.shape).copy_(source)
                return view(buffer, self.shape, self.dtype)
            return ffi.from_dlpack(source)
        if self.kind == "numpy":
            return self._from_numpy(self.value)
        if self.value.is_contiguous() and self.value.data_ptr() % ALIGNMENT == 0:
            return self.value
        return self._from_numpy(np.from_dlpack(self.value))

    def tensor_on_gpu(self) -> Any:
        """Return the TVM tensor of one that is on the GPU, over the same memory where possible."""
        if self.kind == "torch":
            return tvm_ffi().from_dlpack(kernel_ready(self.value))
        if not self.value.is_contiguous() or self.value.data_ptr() % VECTOR_BYTES:
            raise InvalidArgumentError(
                "a tensor is not contiguous, or not aligned",
                got=f"address {self.value.data_ptr():#x}, strides {self.value.strides}",
                allowed=f"contiguous, at a multiple of {VECTOR_BYTES} bytes",
            )
        return self.value

    def _from_numpy(self, array: np.ndarray) -> Any:
        safe = (
            array.flags.c_contiguous
            and array.flags.writeable  # DLPack refuses a read-only array
            and array.ctypes.data % ALIGNMENT == 0
        )
        if not safe:
            array = aligned_copy(array)
        return view(array.reshape(-1).view(np.uint8), self.shape, self.dtype)


def _check_place(value: Any, name: str, gpu: Gpu | None) -> None:
    """Refuse a tensor that is not where the model is."""
    device = value.device
    here = "cpu" if gpu is None else gpu.name
    there = device.type if device.type == "cpu" else f"{device.type}:{device.index or 0}"
    if here == there:
        return
    hint = None
    if _is_torch(value):
        hint = "Use x.cpu()." if gpu is None else f'Use x.to("{here}").'
    raise InvalidArgumentError(
        f"{name} is not where the model is", got=f"a tensor on {there}", allowed=here, hint=hint
    )


def total_bytes(tensors: Iterable[Any]) -> int:
    """Add up the sizes of TVM tensors."""
    return sum(int(tensor.numel()) * int(tensor.dtype.itemsize) for tensor in tensors)


def to_numpy(tensor: Any) -> np.ndarray:
    """Return a TVM tensor as an array over the same memory."""
    if str(tensor.dtype) != "bfloat16":
        return np.from_dlpack(tensor)
    import ml_dtypes

    ffi = tvm_ffi()
    create = ffi.get_global_func("runtime.TVMTensorCreateView")
    bits = create(tensor, ffi.Shape(tuple(tensor.shape)), ffi.dtype("uint16"), 0)
    return np.from_dlpack(bits).view(ml_dtypes.bfloat16)


def _is_torch(value: Any) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def _check(array: _Array, info: TensorInfo, sizes: dict[str, int]) -> None:
    if array.dtype != info.dtype:
        raise InvalidArgumentError(
            f"{info.name} has the wrong element type",
            got=array.dtype,
            allowed=info.dtype,
            hint=_dtype_hint(array, info),
        )
    if len(array.shape) != len(info.shape):
        raise InvalidArgumentError(
            f"{info.name} has the wrong number of dimensions",
            got=f"shape {array.shape}",
            allowed=describe(info),
            hint=_rank_hint(array, info),
        )
    if 0 in array.shape:
        raise InvalidArgumentError(
            f"{info.name} is empty", got=f"shape {array.shape}", allowed=describe(info)
        )
    if not _fits(array.shape, info.shape):
        raise InvalidArgumentError(
            f"{info.name} has the wrong shape",
            got=f"shape {array.shape}",
            allowed=describe(info),
            hint=_shape_hint(array, info),
        )
    for axis, (size, expected) in enumerate(zip(array.shape, info.shape, strict=True)):
        if isinstance(expected, str) and sizes.setdefault(expected, size) != size:
            raise InvalidArgumentError(
                f"axis {axis} of {info.name} does not agree with another axis of size {expected!r}",
                got=size,
                allowed=sizes[expected],
            )


def _fits(shape: Sequence[int], expected: Sequence[int | str]) -> bool:
    return all(
        isinstance(wanted, str) or size == wanted
        for size, wanted in zip(shape, expected, strict=True)
    )


def describe(info: TensorInfo) -> str:
    """Return a signature for people: ``NCHW (n, 3, 224, 224)``."""
    shape = ", ".join(str(size) for size in info.shape)
    return f"{info.layout} ({shape})".strip()


def _dtype_hint(array: _Array, info: TensorInfo) -> str | None:
    if array.dtype == "uint8" and info.layout:
        return "For an image of bytes, call model.preprocess(image) first."
    if array.kind == "torch":
        return f"Use x.to(torch.{info.dtype})."
    return f"Use x.astype({info.dtype!r})." if array.kind == "numpy" else None


def _rank_hint(array: _Array, info: TensorInfo) -> str | None:
    if len(array.shape) + 1 == len(info.shape) and info.layout.startswith("N"):
        return "Add a batch axis: x[None]."
    return None


def _shape_hint(array: _Array, info: TensorInfo) -> str | None:
    orders = {"NCHW": (0, 3, 1, 2), "NHWC": (0, 2, 3, 1)}
    order = orders.get(info.layout)
    if order is not None:
        channel = info.layout.index("C")
        swapped = [array.shape[axis] for axis in order]
        if array.shape[channel] != info.shape[channel] == swapped[channel]:
            other = "NHWC" if info.layout == "NCHW" else "NCHW"
            method = "permute" if array.kind == "torch" else "transpose"
            return f"This looks like {other}, and {info.layout} is expected: use x.{method}{order}."
    if info.layout.startswith("N") and _fits(array.shape[1:], info.shape[1:]):
        return "Compile with this batch size (--batch N) or with any (--dynamic-batch)."
    if info.layout:
        return "Call model.preprocess(image) for this size, or compile for another (--size HxW)."
    return None
