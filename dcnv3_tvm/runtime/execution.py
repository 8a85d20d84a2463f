"""Calls of a model's functions, on the CPU or on a GPU, from any thread."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, TypeAlias

from dcnv3_tvm.errors import InvalidArgumentError
from dcnv3_tvm.runtime import profile
from dcnv3_tvm.runtime.arguments import Arguments
from dcnv3_tvm.runtime.call_threads import Contexts, closed_error
from dcnv3_tvm.runtime.cuda import Gpu
from dcnv3_tvm.runtime.metadata import ArtifactMetadata

Functions: TypeAlias = Mapping[str, Callable[..., Any]]
"""Functions by entry, which take the inputs, and `profile.SET_INSTRUMENT`; one call at a time."""


class Execution(Protocol):
    """Calls functions of a model, and releases them."""

    def run(self, entry: str, arguments: Arguments, threads: int) -> Any:
        """Return what the function of an entry returns: TVM tensors."""

    def profile(
        self, metadata: ArtifactMetadata, arguments: Arguments, *, calls: int, threads: int
    ) -> profile.Profile:
        """Time the kernels of the entry ``"main"``."""

    def close(self) -> None:
        """Release the functions; later calls raise an `InvalidArgumentError`."""


class CpuExecution:
    """Calls on the CPU, side by side.

    Parameters
    ----------
    workers : sequence of Functions
        As many calls run at the same time.
    """

    def __init__(self, workers: Sequence[Functions]) -> None:
        self._workers = Contexts(workers)

    def run(self, entry: str, arguments: Arguments, threads: int) -> Any:  # noqa: D102
        inputs = arguments.to_kernel([])
        return self._workers.run(lambda functions: functions[entry](*inputs), threads)

    def profile(  # noqa: D102
        self, metadata: ArtifactMetadata, arguments: Arguments, *, calls: int, threads: int
    ) -> profile.Profile:
        inputs = arguments.to_kernel([])
        return self._workers.run(
            lambda functions: profile.profile(
                lambda: functions["main"](*inputs),
                functions[profile.SET_INSTRUMENT],
                metadata,
                calls=calls,
                threads=threads,
            ),
            threads,
        )

    def close(self) -> None:  # noqa: D102
        self._workers.close()


class GpuExecution:
    """Calls on a GPU, one at a time, on the caller's stream.

    Parameters
    ----------
    functions : Functions
        The functions.
    gpu : Gpu
        The GPU.
    """

    def __init__(self, functions: Functions, gpu: Gpu) -> None:
        self._functions: Functions | None = functions
        self._gpu = gpu
        self._buffers: list[Any] = []
        self._lock = threading.Lock()

    def run(self, entry: str, arguments: Arguments, threads: int) -> Any:  # noqa: ARG002, D102
        self._gpu.check_process()  # Before the lock, which a thread of the parent may have held.
        with self._lock, self._gpu.model_call(arguments.stream):
            if self._functions is None:
                raise closed_error()
            return self._functions[entry](*arguments.to_kernel(self._buffers))

    def profile(  # noqa: D102
        self,
        metadata: ArtifactMetadata,  # noqa: ARG002
        arguments: Arguments,  # noqa: ARG002
        *,
        calls: int,  # noqa: ARG002
        threads: int,  # noqa: ARG002
    ) -> profile.Profile:
        raise InvalidArgumentError(
            "kernels are timed on the CPU only",
            got=f"a model on {self._gpu.name}",
            hint="On a GPU, use NVIDIA's profiler: nsys profile dcnv3-tvm run ARTIFACT IMAGE",
        )

    def close(self) -> None:  # noqa: D102
        with self._lock:
            self._functions = None
            self._buffers.clear()
            self._gpu.release_unused()
