"""Convert tensors of NumPy, PyTorch and TVM to arguments of compiled code, and results back."""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterable, Sequence
from typing import Any, Final, TypeVar, cast

import numpy as np

from dcnv3_tvm.errors import InvalidArgumentError
from dcnv3_tvm.runtime.library import tvm_ffi

TensorT = TypeVar("TensorT")

ALIGNMENT: Final = 64
"""Bytes. Compiled models load whole vectors from aligned CPU addresses: less crashes them."""

CPU: Final = "cpu"
"""Device of tensors in CPU memory; a GPU's is ``"cuda:0"``."""

_DEVICES: Final = (CPU, "cuda")


def kind_of(name: str, tensor: Any, *, hint: str | None = None) -> str:
    """Return the library that a tensor belongs to: ``"numpy"``, ``"torch"`` or ``"tvm"``.

    Parameters
    ----------
    name : str
        Name of the tensor in errors.
    tensor : object
        What the caller passed.
    hint : str, optional
        Advice for what is not a tensor.

    Raises
    ------
    InvalidArgumentError
        If it is not a tensor, is not dense, has no data, or is neither in CPU memory nor on an
        NVIDIA GPU.
    """
    if isinstance(tensor, np.ndarray):
        # The first use of np.ma imports it, which takes longer than a call.
        if type(tensor) is not np.ndarray and isinstance(tensor, np.ma.MaskedArray):
            raise InvalidArgumentError(
                f"{name} is a masked array",
                hint="Use x.filled(value): the mask has no effect here.",
            )
        return "numpy"
    if _is_torch(tensor):
        dense = tensor.layout == sys.modules["torch"].strided and _has_data(tensor)
        kind = "torch"
        where = f"{type(tensor).__name__}, device {tensor.device}, layout {tensor.layout}"
    elif isinstance(tensor, tvm_ffi().Tensor):
        kind, dense, where = "tvm", True, f"device {tensor.device}"
    else:
        raise InvalidArgumentError(
            f"{name} is not a tensor",
            got=f"{type(tensor).__module__}.{type(tensor).__qualname__}",
            allowed="numpy.ndarray, torch.Tensor or tvm.runtime.Tensor",
            hint=hint,
        )
    if not dense or tensor.device.type not in _DEVICES:
        raise InvalidArgumentError(
            f"{name} is not a dense tensor in CPU memory or on an NVIDIA GPU",
            got=where,
            allowed=", ".join(_DEVICES),
        )
    return kind


def device_of(tensor: Any) -> str:
    """Return the device that holds a tensor: `CPU`, or for example ``"cuda:0"``."""
    if isinstance(tensor, np.ndarray) or tensor.device.type == CPU:
        return CPU
    return f"{tensor.device.type}:{tensor.device.index}"


def shape_of(tensor: Any) -> tuple[int, ...]:
    """Return the shape of a tensor."""
    return tuple(int(size) for size in tensor.shape)


def dtype_of(tensor: Any) -> str:
    """Return the name of a tensor's element type, for example ``"bfloat16"``."""
    return _dtype_name(tensor.dtype)


@functools.lru_cache(maxsize=64)
def _dtype_name(dtype: Any) -> str:
    return str(getattr(dtype, "name", dtype)).removeprefix("torch.")


def to_kernel(tensor: Any, alignment: int = 1) -> Any:
    """Convert a tensor of any kind to a TVM tensor, an argument of compiled code.

    The memory is shared, unless a tensor is not contiguous, is not aligned, is read-only (which
    DLPack does not export) or is not in native byte order; such a tensor is copied.

    Parameters
    ----------
    tensor : numpy.ndarray, torch.Tensor or tvm_ffi.Tensor
        As accepted by `kind_of`.
    alignment : int
        Power of two, at most `ALIGNMENT`; the address must be a multiple of it.

    Raises
    ------
    InvalidArgumentError
        If a TVM tensor on a GPU would have to be copied.
    """
    if isinstance(tensor, np.ndarray):
        return _from_numpy(tensor, alignment)
    if _is_torch(tensor):
        tensor = tensor.detach().resolve_neg().contiguous()
        if tensor.data_ptr() % alignment:
            tensor = tensor.clone()  # PyTorch allocates at multiples of 64 bytes or more.
        return tvm_ffi().from_dlpack(tensor)
    if not needs_copy(tensor, alignment):
        return tensor
    if device_of(tensor) == CPU:
        return _from_numpy(np.from_dlpack(tensor), alignment)
    raise InvalidArgumentError(
        "a TVM tensor on a GPU is not contiguous or not aligned",
        got=f"address {tensor.data_ptr():#x}, strides {tensor.strides}",
        allowed=f"contiguous, at a multiple of {alignment} bytes",
    )


def needs_copy(tensor: Any, alignment: int = 1) -> bool:
    """Return whether `to_kernel`, with the same arguments, copies a tensor."""
    if isinstance(tensor, np.ndarray):
        flags = tensor.flags
        shareable = flags.c_contiguous and flags.writeable and tensor.dtype.isnative
        return not shareable or (alignment > 1 and tensor.ctypes.data % alignment != 0)
    if _is_torch(tensor) and tensor.is_neg():
        return True
    return not tensor.is_contiguous() or tensor.data_ptr() % alignment != 0


def are_plain(*given: Any) -> bool:
    """Return whether compiled code takes tensors of one type as they are.

    It checks shapes, dtypes, strides and devices itself. Looked for are what it does not see, a
    negated view of PyTorch, and strides and read-only memory, for which an error would take long.

    Raises
    ------
    RuntimeError
        If they are sparse, or of torch.func.
    """
    kind = type(given[0])
    # Written out: calls of functions would take as long as the checks.
    if kind is np.ndarray:
        for tensor in given:
            if not tensor.flags.carray:
                return False
        return bool(given[0].dtype.kind == "f")  # DLPack does not export bfloat16.
    torch = sys.modules.get("torch")
    if torch is None or kind is not torch.Tensor:
        return False
    for tensor in given:  # noqa: SIM110  # A generator takes longer.
        if tensor.is_neg() or not tensor.is_contiguous():
            return False
    return True


def overlap(tensor: Any, others: Iterable[Any], itemsize: int) -> bool:
    """Return whether a contiguous TVM tensor shares memory with others, of one size of elements."""
    start = tensor.data_ptr()
    stop = start + tensor.numel() * itemsize
    for other in others:
        first = other.data_ptr()
        if first < stop and start < first + other.numel() * itemsize:
            return True
    return False


def from_kernel(tensor: Any, kind: str) -> Any:
    """Convert a TVM tensor to a kind of `kind_of`, sharing its memory; for NumPy in CPU memory."""
    if kind == "torch":
        return sys.modules["torch"].from_dlpack(tensor)
    return to_numpy(tensor) if kind == "numpy" else tensor


def to_numpy(tensor: Any) -> np.ndarray:
    """Return a contiguous TVM tensor in CPU memory as an array over the same memory."""
    if str(tensor.dtype) != "bfloat16":
        return np.from_dlpack(tensor)
    import ml_dtypes

    # DLPack does not import NumPy's extension types: pass the bits.
    return np.from_dlpack(view(tensor, tensor.shape, "uint16")).view(ml_dtypes.bfloat16)


def empty_like(tensor: TensorT, shape: Sequence[int]) -> TensorT:
    """Allocate an uninitialized tensor of the kind, dtype and device of another."""
    like: Any = tensor
    result: Any
    if isinstance(like, np.ndarray):
        dtype = like.dtype
        result = np.empty(shape, dtype if dtype.isnative else dtype.newbyteorder("="))
    elif _is_torch(like):
        torch = sys.modules["torch"]
        # The first takes half of the time.
        same = like.shape == shape and like.is_contiguous()
        result = torch.empty_like(like) if same else like.new_empty(shape)
    else:
        result = allocate(shape, like.dtype, like.device)
    return cast("TensorT", result)


def zeros_like(tensor: TensorT, shape: Sequence[int]) -> TensorT:
    """Allocate zeros of the kind, dtype and device of another; a TVM tensor on a GPU: anything."""
    result: Any = empty_like(tensor, shape)
    if _is_torch(result):
        result.zero_()
    elif device_of(result) == CPU:
        array = result if isinstance(result, np.ndarray) else to_numpy(result)
        array[...] = 0
    return cast("TensorT", result)


def allocate(shape: Sequence[int], dtype: Any, device: Any) -> Any:
    """Allocate an uninitialized TVM tensor."""
    ffi = tvm_ffi()
    alloc = ffi.get_global_func("runtime.TVMTensorAllocWithScope")
    return alloc(ffi.Shape(tuple(shape)), dtype, device, None)


def view(memory: Any, shape: Sequence[int], dtype: str) -> Any:
    """Return a TVM tensor over the memory of an array or TVM tensor, of any dtype TVM has."""
    ffi = tvm_ffi()
    if isinstance(memory, np.ndarray):
        memory = ffi.from_dlpack(memory)
    create = ffi.get_global_func("runtime.TVMTensorCreateView")
    return create(memory, ffi.Shape(tuple(shape)), ffi.dtype(dtype), 0)


def aligned_bytes(count: int) -> np.ndarray:
    """Return `count` uninitialized bytes at a multiple of `ALIGNMENT`."""
    buffer = np.empty(count + ALIGNMENT, np.uint8)
    start = -buffer.ctypes.data % ALIGNMENT
    return buffer[start : start + count]


def aligned_copy(array: np.ndarray) -> np.ndarray:
    """Return a contiguous copy in native byte order at a multiple of `ALIGNMENT`."""
    dtype = array.dtype.newbyteorder("=")
    copy = aligned_bytes(array.nbytes).view(dtype).reshape(array.shape)
    np.copyto(copy, array)
    return copy


def total_bytes(tensors: Iterable[Any]) -> int:
    """Return the sum of the sizes of TVM tensors, in bytes."""
    return sum(int(tensor.numel()) * int(tensor.dtype.itemsize) for tensor in tensors)


def _is_torch(value: Any) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def _has_data(tensor: Any) -> bool:
    """Return whether a PyTorch tensor has memory of its own, as fake and nested ones do not."""
    if tensor.is_nested:
        return False
    try:
        return bool(tensor.data_ptr()) or tensor.numel() == 0
    except RuntimeError:  # A tensor of torch.func.
        return False


def _from_numpy(array: np.ndarray, alignment: int) -> Any:
    if needs_copy(array, alignment):
        array = aligned_copy(array)
    if dtype_of(array) != "bfloat16":
        return tvm_ffi().from_dlpack(array)
    # DLPack does not export NumPy's extension types: pass the bits.
    return view(array.view(np.uint16), array.shape, "bfloat16")
