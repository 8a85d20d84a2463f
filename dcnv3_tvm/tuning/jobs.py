"""What the processes of a session do: compile a schedule, time it, hold it against the truth."""

from __future__ import annotations

import dataclasses
import math
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
import tvm
from tvm import tirx
from tvm.target import Target

from dcnv3_tvm import schedules, targets
from dcnv3_tvm.compiler.kernel_listing import ENTRY, Tensor, export_kernel
from dcnv3_tvm.dtypes import numpy_dtype
from dcnv3_tvm.machine import usable_cores
from dcnv3_tvm.op.reference import Float64Array
from dcnv3_tvm.runtime import library
from dcnv3_tvm.runtime.cuda import load_runtime
from dcnv3_tvm.schedules.gpu.tensorize import tensorize
from dcnv3_tvm.schedules.space import Decision
from dcnv3_tvm.tuning.tracker import Address, tvm_rpc
from dcnv3_tvm.verify.tolerances import LAYER

_FIRST_CALLS: Final = 3
_LEAST_CALLS: Final = 7
_MOST_CALLS: Final = 100

_DRAWN: Final = 262139
"""Random numbers that are drawn: a prime number, so that no two rows of a tensor are the same."""

_ALL_CORES: Final = 0
"""TVM's mode of a thread pool that may use any core."""

_L2_BYTES: Final = 256 * 2**20
"""Copied between calls on a GPU, which is more than its cache holds."""


@dataclasses.dataclass(frozen=True)
class Place:
    """Where kernels are run.

    Parameters
    ----------
    kind : str
        ``"cpu"`` or ``"cuda"``.
    index : int
        Of the GPU.
    threads : int
        Of the processor.
    tracker : Address, optional
        Of TVM's RPC tracker, where the device is another machine's; else this one's.
    key : str
        Under which servers have registered with the tracker.
    """

    kind: str
    index: int = 0
    threads: int = 1
    tracker: Address | None = None
    key: str = ""

    def measure(
        self, path: Path, arguments: tuple[Tensor, ...], seconds: float, timeout: float
    ) -> list[float]:
        """Time a kernel.

        Before each call the cache is flushed: on a processor of all arguments but the first, on a
        GPU of everything. So weights come from memory, as they do in a model; and so do a residual
        and the lines that the output is written to, and on a GPU the first argument, which a model
        may find in the cache.

        Parameters
        ----------
        path : Path
            What `build` wrote.
        arguments : tuple of Tensor
            Inputs and outputs of the kernel.
        seconds : float
            To spend on calls.
        timeout : float
            Seconds after which a server gives up.

        Returns
        -------
        list of float
            Seconds of single calls.
        """
        module, device = self._load(path, timeout)
        rng = np.random.default_rng(0)
        tensors = [tvm.runtime.tensor(_random(rng, tensor), device) for tensor in arguments]
        flush: dict[str, Any] = {"f_preproc": "cache_flush_cpu_non_first_arg"}
        if self.kind == "cuda":
            flush = {"cache_flush_bytes": _L2_BYTES}

        def time_calls(calls: int) -> list[float]:
            timer = module.time_evaluator(ENTRY, device, number=1, repeat=calls, **flush)
            return list(timer(*tensors).results)

        first = time_calls(_FIRST_CALLS)
        calls = int(seconds / max(min(first), 1e-9))
        return time_calls(max(_LEAST_CALLS, min(calls, _MOST_CALLS)))

    def compare(
        self,
        path: Path,
        arguments: tuple[Tensor, ...],
        function: tirx.PrimFunc,
        timeout: float,
    ) -> str:
        """Hold a compiled kernel against the unscheduled one, which runs on this processor.

        Parameters
        ----------
        path, arguments, timeout
            As for `measure`; the last argument is the output.
        function : tvm.tirx.PrimFunc
            Unscheduled: the loops as they are defined.

        Returns
        -------
        str
            What is wrong, empty if nothing is.
        """
        rng = np.random.default_rng(1)
        inputs = [_random(rng, tensor) for tensor in arguments[:-1]]
        shape, dtype = arguments[-1]
        poison = np.full(shape, np.nan, numpy_dtype(dtype))
        module, device = self._load(path, timeout)
        got = _call(module, device, inputs, poison)
        with tempfile.TemporaryDirectory(prefix="dcnv3-tvm-truth-") as folder:
            truth = Path(folder) / "truth.so"
            export_kernel(function, targets.resolve_target("auto"), truth)
            module = tvm.runtime.load_module(str(truth))
            reference = _call(module, tvm.cpu(0), inputs, poison)
        error = float(np.abs(got - reference).max() / max(1.0, np.abs(reference).max()))
        if error <= LAYER[dtype]:
            return ""
        return f"its result is off by {error:.1e}, where {LAYER[dtype]:.1e} is allowed"

    def _load(self, path: Path, timeout: float) -> tuple[Any, Any]:
        """Open a library there, and return its module and the device."""
        if self.tracker is not None:
            return self._load_remotely(self.tracker, path, timeout)
        if self.kind == "cuda":
            load_runtime()
            return tvm.runtime.load_module(str(path)), tvm.cuda(self.index)
        # On as many cores as there are threads, so that none of these moves about.
        os.sched_setaffinity(0, sorted(usable_cores())[: self.threads])
        library.use_threads(self.threads)
        return tvm.runtime.load_module(str(path)), tvm.cpu(0)

    def _load_remotely(self, tracker: Address, path: Path, timeout: float) -> tuple[Any, Any]:
        session = (
            tvm_rpc()
            .connect_tracker(*tracker)
            .request(self.key, session_timeout=math.ceil(timeout))
        )
        session.upload(str(path))
        session.get_function("runtime.config_threadpool")(_ALL_CORES, self.threads)
        device = session.cuda(self.index) if self.kind == "cuda" else session.cpu(0)
        return session.load_module(path.name), device


def build(
    function: tirx.PrimFunc, target: Target, decisions: Mapping[str, Decision], path: Path
) -> None:
    """Schedule a kernel as decided, and compile it to a shared library.

    Parameters
    ----------
    function : tvm.tirx.PrimFunc
        Unscheduled.
    target : tvm.target.Target
        What it is compiled for.
    decisions : mapping of str to Decision
        Of its rule.
    path : Path
        The library.

    Raises
    ------
    CompileError, RuntimeError
        If there is no such schedule, or it cannot be compiled.
    """
    scheduled = schedules.schedule(function, target, decisions).function
    if targets.is_gpu(target):
        scheduled = tensorize(scheduled)
    export_kernel(scheduled, target, path)


def _call(module: Any, device: Any, inputs: list[Any], poison: Any) -> Float64Array:
    """Call a kernel, with an output full of NaN."""
    result = tvm.runtime.tensor(poison, device)
    module[ENTRY](*(tvm.runtime.tensor(array, device) for array in inputs), result)
    found: Float64Array = result.numpy().astype(np.float64)
    return found


def _random(rng: np.random.Generator, tensor: Tensor) -> Any:
    """Fill a tensor with random numbers, which repeat: drawing all would take most of the time."""
    drawn = rng.standard_normal(min(math.prod(tensor.shape), _DRAWN), np.float32)
    return np.resize(drawn.astype(numpy_dtype(tensor.dtype)), tensor.shape)
