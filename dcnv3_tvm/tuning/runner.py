"""Time a compiled kernel on a device and check its result."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

import numpy as np
import tvm
from tvm import tirx

from dcnv3_tvm import files, targets
from dcnv3_tvm.compiler.kernel_library import ENTRY, export_kernel
from dcnv3_tvm.compiler.kernel_listing import KernelArgument
from dcnv3_tvm.dtypes import numpy_dtype
from dcnv3_tvm.machine import enable_amx, usable_cores
from dcnv3_tvm.op.reference import Float64Array
from dcnv3_tvm.runtime import library
from dcnv3_tvm.runtime.cuda import load_runtime
from dcnv3_tvm.tuning import cpu_caches
from dcnv3_tvm.tuning.rpc import RpcConfig, import_tvm_rpc
from dcnv3_tvm.verify.tolerances import LAYER

_FIRST_CALLS: Final = 3
_MIN_CALLS: Final = 7
_MAX_CALLS: Final = 100

_RANDOM_VALUES: Final = 262139
"""Random values drawn for a tensor: a prime, so that no two rows of a tensor are equal."""

_ANY_CORE: Final = 0
"""Mode of TVM's thread pool in which threads are not bound to cores."""

_GPU_FLUSH_BYTES: Final = 256 * 2**20
"""Bytes written between calls to flush the L2 cache of a GPU; larger than any L2 cache."""


@dataclasses.dataclass(frozen=True)
class KernelRunner:
    """Run compiled kernels on one local or remote device.

    Parameters
    ----------
    kind : str
        ``"cpu"`` or ``"cuda"``.
    index : int
        Index of the GPU.
    threads : int
        Threads on a CPU.
    rpc : RpcConfig, optional
        Run on a remote device instead of this machine's.
    """

    kind: str
    index: int = 0
    threads: int = 1
    rpc: RpcConfig | None = None

    def measure(
        self, path: Path, arguments: tuple[KernelArgument, ...], seconds: float, timeout: float
    ) -> list[float]:
        """Time a kernel with caches as in a model.

        Before each call, all arguments but the first are evicted from the caches of a CPU, and
        everything from those of a GPU. Weights thus come from memory, as they do in a model. So do
        a residual and the output's cache lines, and on a GPU the first argument, which a model may
        find in the cache. On a CPU that is written by the threads which read it.

        Parameters
        ----------
        path : Path
            Library written by `build_candidate`.
        arguments : tuple of KernelArgument
            Inputs and outputs of the kernel.
        seconds : float
            Time to spend on calls.
        timeout : float
            Seconds after which a remote server aborts.

        Returns
        -------
        list of float
            Seconds of each call.
        """
        module, device = self._load(path, timeout)
        rng = np.random.default_rng(0)
        tensors = [tvm.runtime.tensor(_random(rng, tensor), device) for tensor in arguments]
        flush: dict[str, Any] = {"f_preproc": cpu_caches.PREPARE}
        if self.kind == "cuda":
            flush = {"cache_flush_bytes": _GPU_FLUSH_BYTES}

        def time_calls(calls: int) -> list[float]:
            timer = module.time_evaluator(ENTRY, device, number=1, repeat=calls, **flush)
            return list(timer(*tensors).results)

        first = time_calls(_FIRST_CALLS)
        calls = int(seconds / max(min(first), 1e-9))
        return time_calls(max(_MIN_CALLS, min(calls, _MAX_CALLS)))

    def check(
        self,
        path: Path,
        arguments: tuple[KernelArgument, ...],
        outputs: int,
        function: tirx.PrimFunc,
        timeout: float,
    ) -> str:
        """Compare a compiled kernel with its unscheduled definition, run on this machine's CPU.

        Parameters
        ----------
        path, arguments, timeout
            As for `measure`.
        outputs : int
            Number of arguments that are outputs: the last ones.
        function : tvm.tirx.PrimFunc
            Unscheduled kernel.

        Returns
        -------
        str
            Description of the error; empty if all outputs are within the tolerance.
        """
        rng = np.random.default_rng(1)
        inputs = [_random(rng, tensor) for tensor in arguments[:-outputs]]
        module, device = self._load(path, timeout)
        results = _call(module, device, inputs, arguments[-outputs:])
        with files.temporary_folder("reference-") as folder:
            reference_path = Path(folder) / "reference.so"
            export_kernel(function, targets.resolve_target("auto"), reference_path)
            module = tvm.runtime.load_module(str(reference_path))
            references = _call(module, tvm.cpu(0), inputs, arguments[-outputs:])
        for output, result, reference in zip(
            arguments[-outputs:], results, references, strict=True
        ):
            error = float(np.abs(result - reference).max() / max(1.0, np.abs(reference).max()))
            tolerance = LAYER[output.dtype]
            if not error <= tolerance:
                return f"wrong result: error {error:.1e} exceeds the tolerance {tolerance:.1e}"
        return ""

    def _load(self, path: Path, timeout: float) -> tuple[Any, Any]:
        """Load a library on the device; return its module and the device."""
        if self.rpc is not None:
            return self._load_remotely(self.rpc, path, timeout)
        if self.kind == "cuda":
            load_runtime()
            return tvm.runtime.load_module(str(path)), tvm.cuda(self.index)
        # As many cores as threads: threads that migrate make times noisy.
        os.sched_setaffinity(0, sorted(usable_cores())[: self.threads])
        library.use_threads(self.threads)
        enable_amx()
        cpu_caches.register()
        return tvm.runtime.load_module(str(path)), tvm.cpu(0)

    def _load_remotely(self, rpc: RpcConfig, path: Path, timeout: float) -> tuple[Any, Any]:
        session = (
            import_tvm_rpc()
            .connect_tracker(rpc.host, rpc.port)
            .request(rpc.key, session_timeout=math.ceil(timeout))
        )
        session.upload(str(path))
        session.get_function("runtime.config_threadpool")(_ANY_CORE, self.threads)
        device = session.cuda(self.index) if self.kind == "cuda" else session.cpu(0)
        return session.load_module(path.name), device


def _call(
    module: Any, device: Any, inputs: Iterable[Any], outputs: Iterable[KernelArgument]
) -> list[Float64Array]:
    """Call a kernel with outputs full of NaN, so that unwritten elements show."""
    arrays = [np.full(output.shape, np.nan, numpy_dtype(output.dtype)) for output in outputs]
    results = [tvm.runtime.tensor(array, device) for array in arrays]
    module[ENTRY](*(tvm.runtime.tensor(array, device) for array in inputs), *results)
    return [result.numpy().astype(np.float64) for result in results]


def _random(rng: np.random.Generator, tensor: KernelArgument) -> Any:
    """Fill a tensor with repeating random values; drawing all would dominate the time."""
    values = rng.standard_normal(min(math.prod(tensor.shape), _RANDOM_VALUES), np.float32)
    return np.resize(values.astype(numpy_dtype(tensor.dtype)), tensor.shape)
