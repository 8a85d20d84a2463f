"""Run a compiled kernel on tensors of NumPy, PyTorch and TVM."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

from dcnv3_tvm import gpu, machine
from dcnv3_tvm.errors import InvalidArgumentError, TargetError
from dcnv3_tvm.runtime import library, tensors, thread_pool
from dcnv3_tvm.runtime.calls import Contexts, call_here
from dcnv3_tvm.runtime.cuda import Gpu
from dcnv3_tvm.runtime.cuda import load_runtime as load_cuda_runtime
from dcnv3_tvm.runtime.metadata import TargetInfo


@dataclasses.dataclass(frozen=True)
class KernelLibrary:
    """A shared library that is loaded on first use, so that it compiles on machines without a GPU.

    Parameters
    ----------
    code : bytes
        The library.
    on_gpu : bool
        Whether it holds GPU code.
    """

    code: bytes
    on_gpu: bool

    def __getitem__(self, name: str) -> Any:
        return self._module[name]

    @functools.cached_property
    def _module(self) -> Any:
        if self.on_gpu:
            load_cuda_runtime()
        return library.open_library(self.code, permanent=self.on_gpu)

    @functools.cached_property
    def pooled(self) -> bool:
        """Whether loops run on the `thread_pool`."""
        return thread_pool.join(self._module)


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A compiled kernel.

    Parameters
    ----------
    name : str
        Name of its function.
    target : TargetInfo
        Target it was compiled for.
    library : KernelLibrary or tvm.runtime.Executable
        Holds the function.
    rule : str
        Name of the schedule rule that was used.
    record : str
        ``"hit"`` where a tuning record chose the schedule; ``"miss"``, or the reason why a record
        was rejected; empty where no records were used.
    """

    name: str
    target: TargetInfo
    library: Any
    rule: str = ""
    record: str = ""

    @property
    def on_gpu(self) -> bool:
        """Whether it runs on a GPU."""
        return bool(self.target.arch)

    @property
    def alignment(self) -> int:
        """Bytes of which the address of each argument is a multiple."""
        return gpu.VECTOR_BYTES if self.on_gpu else 1

    def check_device(self, device: str) -> None:
        """Check that the kernel is for a device, such as ``"cpu"`` or ``"cuda:0"``.

        Raises
        ------
        InvalidArgumentError
            If it is not.
        """
        if (device != tensors.CPU) != self.on_gpu:
            raise InvalidArgumentError(
                "the tensors are not on the operator's device",
                got=device,
                allowed="an NVIDIA GPU" if self.on_gpu else tensors.CPU,
                hint='Use x.to("cuda"), for PyTorch\'s tensors, or compile_op(spec, "auto").'
                if self.on_gpu
                else 'Use x.cpu(), or compile_op(spec, "cuda").',
            )

    def run(self, device: str, arguments: Sequence[Any]) -> None:
        """Run the kernel.

        Parameters
        ----------
        device : str
            Device of the arguments, for which `check_device` passes.
        arguments : sequence of numpy.ndarray, torch.Tensor or tvm.runtime.Tensor
            With the shapes and dtypes it was compiled for. Results are the last ones; they are
            contiguous, and aligned as their library allocates.

        Raises
        ------
        TargetError
            If the kernel was compiled for another machine.
        DeviceError
            If the GPU has too little free memory, or fails.
        """
        if device == tensors.CPU:
            self.run_on_cpu([tensors.to_kernel(each) for each in arguments])
            return
        present = Gpu.of(_gpu_index(device, self.target.arch))
        function = self._function
        with present.on_stream(present.stream_of(arguments[0])), present.translate_errors():
            function(*(tensors.to_kernel(each, self.alignment) for each in arguments))

    def run_on_cpu(self, arguments: Sequence[Any]) -> None:
        """Run the kernel on TVM tensors in CPU memory.

        Raises
        ------
        TargetError
            If the kernel was compiled for another machine.
        """
        function = self._function
        threads = _threads()
        pooled = self._pooled
        if pooled or threads == 1:
            call_here(function, arguments, threads, pooled=pooled)
        else:
            _cpu_calls().run(lambda _: function(*arguments), threads, here=False)

    @functools.cached_property
    def _pooled(self) -> bool:
        return isinstance(self.library, KernelLibrary) and self.library.pooled

    @functools.cached_property
    def _function(self) -> Any:
        """The function; raises `TargetError` where this machine cannot run it."""
        if not self.on_gpu:
            if self.target.is_for_another_system:
                missing = [self.target.triple]
            else:
                missing = machine.missing_features(self.target.features)
            if missing:
                raise TargetError(
                    "the operator was compiled for another machine",
                    got=f"{self.target.slug}, which needs {', '.join(missing)}",
                    hint='Compile with target="auto".',
                )
        return self.library[self.name]


@functools.cache
def _gpu_index(device: str, arch: str) -> int:
    """Return the index of a GPU such as ``"cuda:0"``, which must run code for `arch`."""
    index = int(device.partition(":")[2])
    present = gpu.device(index)
    if not gpu.runs_on(arch, present.arch):
        raise TargetError(
            "the operator was compiled for another GPU architecture",
            got=f"{arch}, where {device} ({present.name}) has {present.arch}",
            hint=f'Compile with target="{gpu.target_name(present.arch)}".',
        )
    return index


@functools.cache
def _threads() -> int:
    return library.default_threads()


@functools.cache
def _cpu_calls() -> Contexts[None]:
    """As many calls side by side as there are cores for their threads."""
    return Contexts([None] * max(1, len(machine.usable_cores()) // _threads()))
