"""Arrays of NumPy, PyTorch and TVM as arguments of a compiled kernel, without copies."""

from __future__ import annotations

import functools
import sys
from collections.abc import Sequence
from typing import Any, Final

import numpy as np

from dcnv3_tvm.dtypes import numpy_dtype
from dcnv3_tvm.errors import InvalidArgumentError
from dcnv3_tvm.gpu import kernel_ready

CPU: Final = "cpu"
"""The place of arrays in the memory of the processor; that of a GPU is ``"cuda:0"``."""

_DEVICES: Final = (CPU, "cuda")
_KINDS: Final = "numpy.ndarray, torch.Tensor or tvm.runtime.Tensor"


def kind_of(tensors: dict[str, Any]) -> str:
    """Tell which library named tensors come from.

    Parameters
    ----------
    tensors : dict
        Tensors by the names that an error shows.

    Returns
    -------
    str
        ``"numpy"``, ``"torch"`` or ``"tvm"``.

    Raises
    ------
    InvalidArgumentError
        If one is no tensor, they are of different kinds or in different places, or one is neither
        in CPU memory nor on an NVIDIA GPU.
    """
    kinds = {name: _kind(name, tensor) for name, tensor in tensors.items()}
    if len(set(kinds.values())) > 1:
        raise InvalidArgumentError(
            "the tensors are of different kinds",
            got=", ".join(f"{name}: {kind}" for name, kind in kinds.items()),
            allowed="all of one kind",
        )
    places = {name: place_of(tensor) for name, tensor in tensors.items()}
    if len(set(places.values())) > 1:
        raise InvalidArgumentError(
            "the tensors are in different places",
            got=", ".join(f"{name}: {place}" for name, place in places.items()),
            allowed="all in one",
        )
    return next(iter(kinds.values()))


def place_of(tensor: Any) -> str:
    """Tell where a tensor of any kind is: `CPU`, or for example ``"cuda:0"``."""
    if isinstance(tensor, np.ndarray) or tensor.device.type == CPU:
        return CPU
    return f"{tensor.device.type}:{tensor.device.index}"


def shape_of(tensor: Any) -> tuple[int, ...]:
    """Read the shape of a tensor of any kind."""
    return tuple(int(size) for size in tensor.shape)


def dtype_name(tensor: Any) -> str:
    """Name the element type, for example ``"bfloat16"``, of a tensor of any kind."""
    return _name_of(tensor.dtype)


@functools.lru_cache(maxsize=64)
def _name_of(dtype: Any) -> str:
    return str(getattr(dtype, "name", dtype)).removeprefix("torch.")


def to_kernel(kind: str, tensor: Any) -> Any:
    """Make a tensor an argument of a kernel.

    The memory is shared, except that of an array that is not contiguous, not writable (DLPack
    takes none such) or not in native byte order, which is copied.
    """
    if kind == "torch":
        on_cpu = tensor.device.type == CPU
        return _from_dlpack(tensor.detach().contiguous() if on_cpu else kernel_ready(tensor))
    if kind == "tvm":
        return tensor if tensor.is_contiguous() else _from_numpy(np.from_dlpack(tensor))
    return _from_numpy(tensor)


def empty(kind: str, shape: Sequence[int], dtype: str, place: str = CPU) -> Any:
    """Allocate an uninitialised tensor of a kind in a place."""
    if kind == "torch":
        import torch

        return torch.empty(tuple(shape), dtype=getattr(torch, dtype), device=place)
    if kind == "tvm":
        import tvm

        return tvm.runtime.empty(tuple(shape), dtype, tvm.device(place))
    return np.empty(tuple(shape), numpy_dtype(dtype))


def _kind(name: str, tensor: Any) -> str:
    if isinstance(tensor, np.ndarray):
        return "numpy"
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(tensor, torch.Tensor):
        if tensor.device.type not in _DEVICES or tensor.layout != torch.strided:
            raise InvalidArgumentError(
                f"{name} is not a dense tensor in the memory of the processor or an NVIDIA GPU",
                got=f"device {tensor.device}, layout {tensor.layout}",
                allowed=", ".join(_DEVICES),
            )
        return "torch"
    tvm_ffi = sys.modules.get("tvm_ffi")
    if tvm_ffi is not None and isinstance(tensor, tvm_ffi.Tensor):
        if tensor.device.type not in _DEVICES:
            raise InvalidArgumentError(
                f"{name} is not in the memory of the processor or an NVIDIA GPU",
                got=f"device {tensor.device}",
                allowed=", ".join(_DEVICES),
            )
        return "tvm"
    raise InvalidArgumentError(
        f"{name} is not a tensor",
        got=f"{type(tensor).__module__}.{type(tensor).__qualname__}",
        allowed=_KINDS,
    )


def _from_dlpack(tensor: Any) -> Any:
    import tvm_ffi

    return tvm_ffi.from_dlpack(tensor)


def _from_numpy(array: np.ndarray[Any, Any]) -> Any:
    flags = array.flags
    if not (flags.c_contiguous and flags.writeable and array.dtype.isnative):
        native = array.dtype.newbyteorder("=")
        array = np.require(array, dtype=native, requirements=["C", "W"])
    if dtype_name(array) != "bfloat16":
        return _from_dlpack(array)
    # DLPack exports no NumPy extension type: pass the bits, and name them anew.
    import tvm_ffi

    view = tvm_ffi.get_global_func("runtime.TVMTensorCreateView")
    bits = _from_dlpack(array.view(np.uint16))
    return view(bits, tvm_ffi.Shape(array.shape), tvm_ffi.dtype("bfloat16"), 0)
