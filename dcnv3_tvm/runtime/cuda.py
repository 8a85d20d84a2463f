"""Run compiled code on NVIDIA GPUs: streams, copies, memory, and TVM's GPU runtime library."""

from __future__ import annotations

import contextlib
import ctypes
import os
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
from dcnv3_tvm.forks import fork_safe_lock
from dcnv3_tvm.runtime import cuda_toolkit, library
from dcnv3_tvm.runtime.metadata import CUDA_LIBRARY
from dcnv3_tvm.runtime.tensors import allocate, total_bytes

DEVICE_TYPE: Final = 2
"""DLPack's device type of NVIDIA GPUs."""

_DRIVER_RELEASE: Final = 580
_FREE_MEMORY: Final = 15
"""TVM's number of the device attribute."""

_MEMORY_ALLOCATION: Final = 2
"""CUDA's number of the error."""

_OUT_OF_MEMORY: Final = ("cudaErrorMemoryAllocation", "CUDA_ERROR_OUT_OF_MEMORY")

_lock = fork_safe_lock()
_gpus: dict[int, Gpu] = {}
_call_lock = threading.RLock()
"""Held during calls on any GPU: while a thread captures a graph, no other may allocate memory, or
free it, which would end the process."""


class Gpu:
    """A GPU of this machine. Use `of`, which returns one object per GPU.

    Calls are serialized across all models and GPUs, because no thread may allocate memory while
    another captures a CUDA graph. Models reuse memory of their earlier calls and of freed results;
    therefore a call on another stream waits for the work on the previous one.

    Parameters
    ----------
    index : int
        CUDA's device index.
    """

    def __init__(self, index: int) -> None:
        self.index = index
        self.name = f"cuda:{index}"
        ffi = library.tvm_ffi()
        self.device = ffi.device("cuda", index)
        self._select = ffi.get_global_func("__tvm_set_device")
        self._process = os.getpid()
        self._last_stream: int | None = None

    @staticmethod
    def of(index: int) -> Gpu:
        """Return the GPU with this index. Call `load_runtime` before."""
        with _lock:
            if index not in _gpus:
                _gpus[index] = Gpu(index)
            _gpus[index].check_process()
            return _gpus[index]

    def check_process(self) -> None:
        """Check that this process is not forked from one that used the GPU: CUDA would fail.

        Raises
        ------
        DeviceError
            If it is.
        """
        if os.getpid() != self._process:
            raise DeviceError(
                f"the process was forked after the GPU {self.name} was used",
                hint="CUDA does not work there. Start the process with "
                'multiprocessing.get_context("spawn"), or load models only in child processes.',
            )

    @contextlib.contextmanager
    def on_stream(self, stream: int) -> Iterator[None]:
        """Run kernels called by this thread on `stream`, a CUDA stream handle."""
        self.check_process()
        raw_stream = library.tvm_ffi().use_raw_stream
        with _call_lock, _torch_device(self.index), raw_stream(self.device, stream):
            # See tvm_workarounds: cuda-current-device.
            self._select(DEVICE_TYPE, self.index)
            yield

    @contextlib.contextmanager
    def model_call(self, stream: int) -> Iterator[None]:
        """Run a call of a model on `stream`, after the calls of all models on other streams.

        Raises
        ------
        InvalidArgumentError
            If PyTorch is capturing the stream into a CUDA graph.
        DeviceError
            If the process was forked after the GPU was used.
        """
        with self.on_stream(stream):
            _check_not_capturing()
            if self._last_stream not in (None, stream):
                order = library.tvm_ffi().get_global_func("runtime.Device_StreamSyncFromTo")
                with self.translate_errors():
                    order(self.device, self._last_stream, stream)
            self._last_stream = stream
            yield
            _forget_retried_allocation()

    @contextlib.contextmanager
    def exclusive(self) -> Iterator[None]:
        """Let no other thread make a call, as is needed to free memory."""
        with _call_lock:
            yield

    def is_usable(self) -> bool:
        """Return whether the GPU works: not after a fault, such as an illegal access."""
        if os.getpid() != self._process:
            return False
        try:
            with _call_lock, _torch_device(self.index):
                self._synchronize(self._last_stream or 0)
        except (RuntimeError, ValueError, TypeError):
            return False
        return True

    def stream_of(self, tensor: Any) -> int:
        """Return the current stream of the framework that a tensor on this GPU belongs to."""
        torch = sys.modules.get("torch")
        if torch is None or not isinstance(tensor, torch.Tensor):
            return int(library.tvm_ffi().get_raw_stream(self.device))
        return int(torch.cuda.current_stream(self.index).cuda_stream)

    def open_executable(self, code: bytes) -> Any:
        """Open a compiled model and return its virtual machine, initialized on this GPU.

        Raises
        ------
        ArtifactError
            If it cannot be loaded.
        DeviceError
            If the GPU has too little free memory, or fails.
        """
        with _call_lock, _torch_device(self.index):
            try:
                (machine,) = library.open_executables(code, (DEVICE_TYPE, self.index)).machines
            except ArtifactError as error:
                gpu_error = self.translate_error(error)
                if gpu_error is None:
                    raise
                raise gpu_error from error
            self._synchronize(0)  # Constants are copied on the default stream.
        return machine

    def upload_all(self, tensors: Mapping[str, Any]) -> dict[str, Any]:
        """Copy named TVM tensors in CPU memory to this GPU.

        Raises
        ------
        DeviceError
            If the GPU has too little free memory, or fails.
        """
        needed = f"{format_bytes(total_bytes(tensors.values()))} for weights"
        with _call_lock, _torch_device(self.index), self.translate_errors(needed):
            return {name: self._copy_in(tensor, None) for name, tensor in tensors.items()}

    def upload(self, host: Any, into: Any = None) -> Any:
        """Copy a contiguous TVM tensor from CPU memory to this GPU, synchronously.

        Parameters
        ----------
        host : tvm_ffi.Tensor
            The source.
        into : tvm_ffi.Tensor, optional
            Destination on this GPU, used if its shape and dtype match.

        Raises
        ------
        DeviceError
            If the GPU has too little free memory, or fails.
        """
        with _call_lock, _torch_device(self.index), self.translate_errors():
            return self._copy_in(host, into)

    def _copy_in(self, host: Any, into: Any) -> Any:
        ffi = library.tvm_ffi()
        if into is None or (into.shape, into.dtype) != (host.shape, host.dtype):
            into = allocate(host.shape, host.dtype, self.device)
        copy = ffi.get_global_func("runtime.TVMTensorCopyFromBytes")
        copy(into, ctypes.c_void_p(host.data_ptr()), total_bytes([host]))
        return into

    def download(self, tensor: Any, buffer: np.ndarray, stream: int) -> None:
        """Copy a tensor to `buffer`, an array of as many bytes, after the work on `stream`.

        Raises
        ------
        DeviceError
            If the GPU fails.
        """
        ffi = library.tvm_ffi()
        with _call_lock, _torch_device(self.index), self.translate_errors():
            self._synchronize(stream)
            copy = ffi.get_global_func("runtime.TVMTensorCopyToBytes")
            copy(tensor, ctypes.c_void_p(buffer.ctypes.data), buffer.nbytes)

    def _synchronize(self, stream: int) -> None:
        library.tvm_ffi().get_global_func("runtime.Device_StreamSync")(self.device, stream)

    def release_unused(self) -> None:
        """Free the memory that models keep for later calls and that is not in use."""
        with _call_lock, _torch_device(self.index):
            library.tvm_ffi().get_global_func("vm.builtin.memory_manager.clear")()

    def free_bytes(self) -> int | None:
        """Return the free memory; None if the GPU does not report it."""
        ffi = library.tvm_ffi()
        with _call_lock, _torch_device(self.index):
            try:
                self._select(DEVICE_TYPE, self.index)
                attribute = ffi.get_global_func("runtime.GetDeviceAttr")
                return int(attribute(DEVICE_TYPE, self.index, _FREE_MEMORY))
            except (RuntimeError, ValueError, TypeError):
                return None

    @contextlib.contextmanager
    def translate_errors(self, needed: str | None = None) -> Iterator[None]:
        """Raise failures of this GPU as `translate_error` returns them."""
        try:
            yield
        except (RuntimeError, ValueError, TypeError) as error:
            gpu_error = self.translate_error(error, needed=needed)
            if gpu_error is None:
                raise
            raise gpu_error from error

    def translate_error(
        self, error: BaseException, *, needed: str | None = None
    ) -> DCNv3Error | None:
        """Convert an error of TVM that reports a failure of this GPU; None for any other error.

        Parameters
        ----------
        error : BaseException
            Raised by TVM.
        needed : str, optional
            Description of the memory that was needed.
        """
        if not is_out_of_memory(error):
            if "CUDA" not in str(error):
                return None
            return DeviceError(
                f"the GPU {self.name} failed",
                got=first_line(error),
                hint="An earlier operation may have caused it. After an illegal access, all later "
                "operations of the process fail as well.",
            )
        # See tvm_workarounds: cuda-last-error.
        cuda_toolkit.load_cudart().cudaGetLastError()
        free = self.free_bytes()
        got = [] if needed is None else [f"needed: {needed}"]
        got += [] if free is None else [f"free: {format_bytes(free)}"]
        return DeviceError(
            f"the GPU {self.name} has too little free memory",
            got=", ".join(got) or first_line(error),
            hint="Close other models and programs that use it (torch.cuda.empty_cache() frees "
            "PyTorch's cache), or compile for a smaller batch.",
        )


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error of TVM says that a GPU has too little free memory."""
    return any(word in str(error) for word in _OUT_OF_MEMORY)


def needed_memory(weights: int, activations: int | None) -> str:
    """Describe the memory that a call needs; sizes in bytes."""
    call = "an unknown amount" if activations is None else format_bytes(activations)
    return f"{format_bytes(weights)} for weights and {call} for a call"


def format_bytes(size: int) -> str:
    """Format a number of bytes, for example ``"2.50 GB"``."""
    return f"{size / 1e6:.1f} MB" if size < 1e9 else f"{size / 1e9:.2f} GB"


def load_runtime(bundled: Path | None = None) -> None:
    """Load TVM's runtime library for NVIDIA GPUs, unless this process holds it already.

    `library.load_runtime` must have loaded the main runtime library.

    Parameters
    ----------
    bundled : Path, optional
        The copy in the artifact, used if TVM is not installed.

    Raises
    ------
    TargetError
        If there is no driver, or it is too old.
    MissingDependencyError
        If CUDA's runtime library is not installed.
    ArtifactError
        If TVM's GPU library is missing or cannot be loaded.
    """
    ffi = library.tvm_ffi()

    def loaded() -> bool:
        return ffi.get_global_func("device_api.cuda", allow_missing=True) is not None

    with _lock:
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
                got=found or "no file",
                hint="Compile the model again, or reinstall apache-tvm.",
            )


def _check_driver() -> None:
    gpu.device()
    version = gpu.driver_version()
    if version is not None and version < cuda_toolkit.VERSION:
        raise TargetError(
            "the driver of the GPU is too old",
            got="a driver for CUDA {}.{}".format(*version),
            allowed="CUDA {}.{} or newer".format(*cuda_toolkit.VERSION),
            hint=f"Install an NVIDIA driver of release {_DRIVER_RELEASE} or newer.",
        )


def _torch_device(index: int) -> contextlib.AbstractContextManager[Any]:
    """Restore PyTorch's current device. See tvm_workarounds: cuda-current-device."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return contextlib.nullcontext()
    device: contextlib.AbstractContextManager[Any] = torch.cuda.device(index)
    return device


def _forget_retried_allocation() -> None:
    """Clear the error of an allocation that TVM retried with success.

    See tvm_workarounds: cuda-last-error.
    """
    cudart = cuda_toolkit.load_cudart()
    if cudart.cudaPeekAtLastError() == _MEMORY_ALLOCATION:
        cudart.cudaGetLastError()


def _check_not_capturing() -> None:
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return
    if torch.cuda.is_current_stream_capturing():
        raise InvalidArgumentError(
            "a compiled model cannot be captured into a CUDA graph",
            hint="Call it outside of torch.cuda.graph; it replays a CUDA graph of its own.",
        )
