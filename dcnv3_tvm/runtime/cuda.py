"""NVIDIA GPUs as models use them: streams, copies, memory, and TVM's runtime library for them."""

from __future__ import annotations

import contextlib
import ctypes
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np

from dcnv3_tvm import gpu
from dcnv3_tvm.errors import (
    ArtifactError,
    DCNv3Error,
    DeviceError,
    InvalidArgumentError,
    TargetError,
    first_line,
)
from dcnv3_tvm.runtime import cuda_toolkit, library
from dcnv3_tvm.runtime.metadata import CUDA_LIBRARY
from dcnv3_tvm.runtime.tensors import allocate, total_bytes

DEVICE_TYPE: Final = 2
"""DLPack's number for memory of NVIDIA GPUs."""

_DRIVER_RELEASE: Final = 580
_FREE_MEMORY: Final = 15
"""TVM's number of a device's attribute."""

_OUT_OF_MEMORY: Final = ("cudaErrorMemoryAllocation", "CUDA_ERROR_OUT_OF_MEMORY")

_making = threading.Lock()
_gpus: dict[int, Gpu] = {}


class Gpu:
    """A GPU of this machine; `of` gives the one object there is for each.

    All calls on a GPU, of all models, take turns: while one is captured into a graph, no thread may
    allocate. A model uses the memory of its calls before, and all of them that of results nobody
    holds any more: where the caller's stream changes, the new one waits for what the last one has
    been given.

    Parameters
    ----------
    index : int
        Its number, as CUDA counts.
    """

    def __init__(self, index: int) -> None:
        self.index = index
        self.name = f"cuda:{index}"
        ffi = library.tvm_ffi()
        self.device = ffi.device("cuda", index)
        self._select = ffi.get_global_func("__tvm_set_device")
        self._lock = threading.RLock()
        self._last_stream: int | None = None

    @staticmethod
    def of(index: int) -> Gpu:
        """Return the GPU of a number; `load_runtime` comes first."""
        with _making:
            if index not in _gpus:
                _gpus[index] = Gpu(index)
            return _gpus[index]

    @contextlib.contextmanager
    def on_stream(self, stream: int) -> Iterator[None]:
        """While entered, kernels that this thread calls run on `stream`, a CUDA handle."""
        raw_stream = library.tvm_ffi().use_raw_stream
        with self._lock, _torch_device(self.index), raw_stream(self.device, stream):
            self._select(DEVICE_TYPE, self.index)  # which a graph does not do by itself
            yield

    @contextlib.contextmanager
    def turn_on_stream(self, stream: int) -> Iterator[None]:
        """Do the same for a model, behind all that streams of earlier models hold.

        Raises
        ------
        InvalidArgumentError
            If PyTorch captures the stream.
        """
        with self.on_stream(stream):
            _refuse_capture()
            if self._last_stream not in (None, stream):
                order = library.tvm_ffi().get_global_func("runtime.Device_StreamSyncFromTo")
                with self.own_errors():
                    order(self.device, self._last_stream, stream)
            self._last_stream = stream
            yield

    def stream_of(self, tensor: Any) -> int:
        """Return the stream on which the caller works with a tensor of this GPU."""
        torch = sys.modules.get("torch")
        if torch is None or not isinstance(tensor, torch.Tensor):
            return int(library.tvm_ffi().get_raw_stream(self.device))
        return int(torch.cuda.current_stream(self.index).cuda_stream)

    def open_executable(self, code: bytes) -> Any:
        """Open a model's compiled code and return its virtual machine, ready on this GPU.

        Raises
        ------
        ArtifactError
            If it cannot be loaded.
        DeviceError
            If there is too little memory, or the GPU fails.
        """
        with self._lock, _torch_device(self.index):
            try:
                machine = library.open_executable(code, (DEVICE_TYPE, self.index))
            except ArtifactError as error:
                told = self.error(error)
                if told is None:
                    raise
                raise told from error
            self._wait(0)  # for its literals, which are copied on the default stream
        return machine

    def upload_all(self, tensors: Mapping[str, Any]) -> dict[str, Any]:
        """Copy named TVM tensors in CPU memory to this GPU.

        Raises
        ------
        DeviceError
            If there is too little memory, or the GPU fails.
        """
        needed = f"{in_words(total_bytes(tensors.values()))} for weights"
        with self._lock, _torch_device(self.index), self.own_errors(needed):
            return {name: self._copy_in(tensor, None) for name, tensor in tensors.items()}

    def upload(self, host: Any, into: Any = None) -> Any:
        """Copy a contiguous TVM tensor in CPU memory to this GPU, and wait until it is there.

        Parameters
        ----------
        host : tvm_ffi.Tensor
            What is copied.
        into : tvm_ffi.Tensor, optional
            Memory on this GPU, used if it has the shape and the type.

        Raises
        ------
        DeviceError
            If there is too little memory, or the GPU fails.
        """
        with self._lock, _torch_device(self.index), self.own_errors():
            return self._copy_in(host, into)

    def _copy_in(self, host: Any, into: Any) -> Any:
        ffi = library.tvm_ffi()
        if into is None or (into.shape, into.dtype) != (host.shape, host.dtype):
            into = allocate(host.shape, host.dtype, self.device)
        copy = ffi.get_global_func("runtime.TVMTensorCopyFromBytes")
        copy(into, ctypes.c_void_p(host.data_ptr()), total_bytes([host]))
        return into

    def download(self, tensor: Any, buffer: np.ndarray, stream: int) -> None:
        """Copy a tensor of this GPU to `buffer`, bytes of its size, when `stream` has written it.

        Raises
        ------
        DeviceError
            If the GPU fails.
        """
        ffi = library.tvm_ffi()
        with self._lock, _torch_device(self.index), self.own_errors():
            self._wait(stream)
            copy = ffi.get_global_func("runtime.TVMTensorCopyToBytes")
            copy(tensor, ctypes.c_void_p(buffer.ctypes.data), buffer.nbytes)

    def _wait(self, stream: int) -> None:
        library.tvm_ffi().get_global_func("runtime.Device_StreamSync")(self.device, stream)

    def release_unused(self) -> None:
        """Give back to the GPU what models held for later calls and none uses any more."""
        with self._lock, _torch_device(self.index):
            library.tvm_ffi().get_global_func("vm.builtin.memory_manager.clear")()

    def free_bytes(self) -> int | None:
        """Measure the free memory; None where the GPU does not say."""
        ffi = library.tvm_ffi()
        with self._lock, _torch_device(self.index):
            try:
                self._select(DEVICE_TYPE, self.index)
                ask = ffi.get_global_func("runtime.GetDeviceAttr")
                return int(ask(DEVICE_TYPE, self.index, _FREE_MEMORY))
            except (RuntimeError, ValueError, TypeError):
                return None

    @contextlib.contextmanager
    def own_errors(self, needed: str | None = None) -> Iterator[None]:
        """While entered, what fails on this GPU is raised as `error` says it."""
        try:
            yield
        except (RuntimeError, ValueError, TypeError) as error:
            told = self.error(error, needed=needed)
            if told is None:
                raise
            raise told from error

    def error(self, error: BaseException, *, needed: str | None = None) -> DCNv3Error | None:
        """Say in words what failed on this GPU; None where it was not the GPU.

        Parameters
        ----------
        error : BaseException
            What TVM raised.
        needed : str, optional
            The memory that was needed, in words.
        """
        text = str(error)
        if not any(word in text for word in _OUT_OF_MEMORY):
            if "CUDA" not in text:
                return None
            return DeviceError(
                f"the GPU {self.name} failed",
                got=first_line(error),
                hint="What failed may be an earlier operation; after an illegal access, every "
                "later one of the process fails too.",
            )
        _forget_error()
        free = self.free_bytes()
        got = [] if needed is None else [f"needed: {needed}"]
        got += [] if free is None else [f"free: {in_words(free)}"]
        return DeviceError(
            f"the GPU {self.name} has too little free memory",
            got=", ".join(got) or first_line(error),
            hint="Close other models and programs on it (torch.cuda.empty_cache() gives back what "
            "PyTorch keeps), or compile for a smaller batch.",
        )


def needed_memory(weights: int, activations: int | None) -> str:
    """Say how much memory a call takes, from numbers of bytes."""
    call = "an unknown amount" if activations is None else in_words(activations)
    return f"{in_words(weights)} for weights and {call} for a call"


def in_words(size: int) -> str:
    """Return a number of bytes for people."""
    return f"{size / 1e6:.1f} MB" if size < 1e9 else f"{size / 1e9:.2f} GB"


def load_runtime(bundled: Path | None = None) -> None:
    """Make sure that this process holds TVM's runtime library for NVIDIA GPUs, once.

    TVM's own runtime library is there already (`library.load_runtime`).

    Parameters
    ----------
    bundled : Path, optional
        The artifact's copy, used where TVM is not installed.

    Raises
    ------
    TargetError
        If there is no driver, or it is too old.
    MissingDependencyError
        If CUDA's runtime library is not installed.
    ArtifactError
        If TVM's library for GPUs is missing or broken.
    """
    ffi = library.tvm_ffi()

    def loaded() -> bool:
        return ffi.get_global_func("device_api.cuda", allow_missing=True) is not None

    with _making:
        if loaded():
            return
        _check_driver()
        cuda_toolkit.load_cudart()
        installed = library.installed_runtime()
        candidates = [] if installed is None else [installed[0].with_name(CUDA_LIBRARY)]
        candidates += [] if bundled is None else [bundled]
        found = next((path for path in candidates if path.is_file()), None)
        if found is not None:
            library.load_global(found)
        if not loaded():
            raise ArtifactError(
                f"{CUDA_LIBRARY}, TVM's runtime library for GPUs, is missing",
                got=found or "no such file",
                hint="Compile the model again, or reinstall apache-tvm.",
            )


def _check_driver() -> None:
    gpu.device()
    version = gpu.driver_version()
    if version is not None and version < cuda_toolkit.VERSION:
        raise TargetError(
            "the driver of the GPU is too old",
            got="one for CUDA {}.{}".format(*version),
            allowed="CUDA {}.{} or newer".format(*cuda_toolkit.VERSION),
            hint=f"Install an NVIDIA driver of release {_DRIVER_RELEASE} or newer.",
        )


def _torch_device(index: int) -> contextlib.AbstractContextManager[Any]:
    """Keep PyTorch's current device, which belongs to the thread and which TVM changes."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return contextlib.nullcontext()
    device: contextlib.AbstractContextManager[Any] = torch.cuda.device(index)
    return device


def _refuse_capture() -> None:
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return
    if torch.cuda.is_current_stream_capturing():
        raise InvalidArgumentError(
            "a compiled model cannot be captured into a CUDA graph",
            hint="Call it outside of torch.cuda.graph: it replays a graph of its own.",
        )


def _forget_error() -> None:
    """Clear the error that CUDA keeps for the thread, or the next to ask would take it for his."""
    cuda_toolkit.load_cudart().cudaGetLastError()
