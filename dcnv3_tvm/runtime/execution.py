"""Calls of a model's functions, on the CPU or on a GPU, from any thread."""

from __future__ import annotations

import ctypes
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, TypeAlias

from dcnv3_tvm.runtime import cuda, profile
from dcnv3_tvm.runtime.arguments import Arguments
from dcnv3_tvm.runtime.calls import Contexts, closed_error
from dcnv3_tvm.runtime.metadata import ArtifactMetadata

Functions: TypeAlias = Mapping[str, Callable[..., Any]]
"""Functions by entry, which take the inputs, and `profile.SET_INSTRUMENT`; one call at a time."""


class Execution(Protocol):
    """Calls functions of a model, and releases them."""

    def run(self, entry: str, arguments: Arguments, threads: int, *, rotate: bool = False) -> Any:
        """Return what the function of an entry returns: TVM tensors.

        With `rotate`, as many calls as there are workers use each of them, if no other call runs.
        """

    def close(self) -> None:
        """Release the functions; later calls raise an `InvalidArgumentError`."""


class CpuExecution:
    """Calls on the CPU, side by side.

    Parameters
    ----------
    workers : sequence of Functions
        As many calls run at the same time.
    pooled : bool
        Whether loops run on the `thread_pool`.
    """

    def __init__(self, workers: Sequence[Functions], *, pooled: bool) -> None:
        self._workers = Contexts(workers)
        self._pooled = pooled

    def run(  # noqa: D102
        self, entry: str, arguments: Arguments, threads: int, *, rotate: bool = False
    ) -> Any:
        inputs = arguments.to_kernel([])
        return self._workers.run(
            lambda functions: functions[entry](*inputs),
            threads,
            here=self._pooled,
            rotate=rotate,
        )

    def profile(
        self,
        entry: str,
        metadata: ArtifactMetadata,
        arguments: Arguments,
        *,
        calls: int,
        threads: int,
    ) -> profile.Profile:
        """Time the kernels of an entry."""
        inputs = arguments.to_kernel([])

        def run(job: profile.Job) -> Any:
            return self._workers.run(
                lambda functions: job(
                    lambda: functions[entry](*inputs), functions[profile.SET_INSTRUMENT]
                ),
                threads,
                # The virtual machine calls Python, which Ctrl-C interrupts in the main thread only.
                here=False,
            )

        return profile.profile(run, metadata, calls=calls, threads=threads)

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

    def __init__(self, functions: Functions, gpu: cuda.Gpu) -> None:
        self._gpu = gpu
        self._held = _Held(functions)
        self._captured: set[str] = set()
        self._lock = threading.Lock()
        # Also of a model that is not closed, and when the process exits.
        self._release = weakref.finalize(self, _release, self._held, gpu)

    def run(  # noqa: D102
        self,
        entry: str,
        arguments: Arguments,
        threads: int,  # noqa: ARG002
        *,
        rotate: bool = False,  # noqa: ARG002
    ) -> Any:
        self._gpu.check_process()  # Before the lock, which a thread of the parent may have held.
        with self._lock, self._gpu.model_call(arguments.stream):
            if self._held.functions is None:
                raise closed_error()
            function = self._held.functions[entry]
            inputs = arguments.to_kernel(self._held.buffers)
            try:
                result = function(*inputs)
            except (RuntimeError, ValueError, TypeError) as error:
                # Another thread may have invalidated the capture of the first call.
                if entry in self._captured or cuda.is_out_of_memory(error):
                    raise
                if not self._gpu.is_usable():
                    raise
                result = function(*inputs)
            self._captured.add(entry)
            return result

    def close(self) -> None:  # noqa: D102
        with self._lock:
            self._release()


class _Held:
    """What a model on a GPU keeps: functions with their weights and graphs, and input buffers."""

    def __init__(self, functions: Functions) -> None:
        self.functions: Functions | None = functions
        self.buffers: list[Any] = []


def _release(held: _Held, gpu: cuda.Gpu) -> None:
    """Free memory and graphs, but not after a fault. See tvm_workarounds: cuda-teardown."""
    with gpu.exclusive():
        kept = (held.functions, held.buffers)
        held.functions, held.buffers = None, []
        if gpu.is_usable():
            del kept
            gpu.release_unused()
        else:
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(kept))
