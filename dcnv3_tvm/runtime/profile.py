"""Time of each kernel within calls of a compiled model."""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, Final, TypeAlias

from dcnv3_tvm.dtypes import numpy_dtype
from dcnv3_tvm.runtime import library
from dcnv3_tvm.runtime.metadata import ArtifactMetadata, KernelWork

SET_INSTRUMENT: Final = "set_instrument"
"""Function of TVM's virtual machine that sets what it calls before and after each kernel."""

_NO_INSTRUMENT: Final = "dcnv3_tvm.no_instrument"
_WARM_UP: Final = 2

Job: TypeAlias = Callable[[Callable[[], Any], Callable[[Any], Any]], Any]
"""Takes a function that calls the model, and `SET_INSTRUMENT` of its virtual machine."""


@dataclasses.dataclass(frozen=True)
class ProfiledKernel:
    """A kernel within calls of a model, with arguments of the same shapes.

    Parameters
    ----------
    name : str
        Name of the kernel.
    rule : str
        Schedule rule that was applied to it.
    record : str
        ``"hit"`` if a tuning record determined its schedule, ``"miss"`` or a reason if not; empty
        if the artifact was compiled without records.
    shapes : str
        Shapes of the inputs, an arrow, and the shape of the result.
    calls : int
        Calls in one call of the model.
    flops, bytes : int
        Operations, and bytes of inputs, weights and result, of one call of the kernel.
    matmul_dtype : str
        Element type at whose matmul rate the operations run.
    seconds : float
        Time of all its calls in one call of the model: the median over calls of the model.
    """

    name: str
    rule: str
    record: str
    shapes: str
    calls: int
    flops: int
    bytes: int
    matmul_dtype: str
    seconds: float


@dataclasses.dataclass(frozen=True)
class KernelEvent:
    """A call of a kernel: its name, and start and duration in seconds."""

    name: str
    start: float
    seconds: float


@dataclasses.dataclass(frozen=True)
class Profile:
    """Where a model spends its time.

    Parameters
    ----------
    kernels : tuple of ProfiledKernel
        Those that take longest first.
    seconds : float
        Median time of a call, measured without looking at the kernels.
    calls, threads : int
        Number of calls that were measured, and their CPU threads.
    timeline : tuple of KernelEvent
        The kernels in the order in which the last call ran them.
    """

    kernels: tuple[ProfiledKernel, ...]
    seconds: float
    calls: int
    threads: int
    timeline: tuple[KernelEvent, ...]

    @property
    def other_seconds(self) -> float:
        """Time of a call outside the kernels: checks, and memory for results."""
        return max(0.0, self.seconds - sum(kernel.seconds for kernel in self.kernels))


class _Recorder:
    """What the virtual machine calls; keeps the calls of kernels, with their arguments once."""

    def __init__(self, kernels: Sequence[str]) -> None:
        self._kernels = frozenset(kernels)
        self._start = 0.0
        self.events: list[tuple[tuple[str, Any], KernelEvent]] = []

    def __call__(self, _: Any, name: str, before: bool, __: Any, *arguments: Any) -> None:
        now = time.perf_counter()
        if name not in self._kernels:
            return
        if before:
            self._start = time.perf_counter()
            return
        tensors = [tensor for tensor in arguments if hasattr(tensor, "shape")]
        described = tuple((tuple(tensor.shape), str(tensor.dtype)) for tensor in tensors)
        self.events.append(((name, described), KernelEvent(name, self._start, now - self._start)))


def profile(
    run: Callable[[Job], Any],
    metadata: ArtifactMetadata,
    *,
    calls: int,
    threads: int,
) -> Profile:
    """Time the kernels within calls of a model, alternately with whole calls.

    Parameters
    ----------
    run : callable
        Runs a job with a virtual machine of the model. Between jobs, other calls of the model may
        run, the process may fork, and Ctrl-C ends the profile.
    metadata : ArtifactMetadata
        Metadata of the model.
    calls : int
        Number of calls to measure.
    threads : int
        CPU threads of a call.
    """
    library.tvm_ffi().register_global_func(_NO_INSTRUMENT, lambda: None, override=True)
    for _ in range(_WARM_UP):
        run(lambda function, _: function())
    whole: list[float] = []
    sums: dict[tuple[str, Any], list[float]] = collections.defaultdict(list)
    counts: collections.Counter[tuple[str, Any]] = collections.Counter()
    timeline: tuple[KernelEvent, ...] = ()
    for _ in range(calls):
        recorder = _Recorder(list(metadata.kernels))
        whole.append(run(functools.partial(_time, recorder)))
        total: dict[Any, float] = collections.defaultdict(float)
        for key, event in recorder.events:
            total[key] += event.seconds
        counts = collections.Counter(key for key, _ in recorder.events)
        for key, seconds in total.items():
            sums[key].append(seconds)
        timeline = tuple(event for _, event in recorder.events)
    kernels = [
        _kernel(*key, counts[key], statistics.median(seconds), metadata)
        for key, seconds in sums.items()
    ]
    kernels.sort(key=lambda kernel: -kernel.seconds)
    return Profile(tuple(kernels), statistics.median(whole), calls, threads, timeline)


def _time(
    recorder: _Recorder, function: Callable[[], Any], set_instrument: Callable[[Any], Any]
) -> float:
    """Record the kernels of a call, after measuring the seconds of another."""
    start = time.perf_counter()
    function()
    seconds = time.perf_counter() - start
    set_instrument(recorder)
    try:
        function()
    finally:
        set_instrument(_NO_INSTRUMENT)
    return seconds


def _kernel(
    name: str,
    tensors: Sequence[tuple[tuple[int, ...], str]],
    calls: int,
    seconds: float,
    metadata: ArtifactMetadata,
) -> ProfiledKernel:
    work = metadata.work.get(name, KernelWork(flops_per_output=0, matmul=False))
    described = [
        "x".join(map(str, shape)) + ("" if dtype == "float32" else f" {dtype}")
        for shape, dtype in tensors
    ]
    return ProfiledKernel(
        name=name,
        rule=metadata.kernels[name],
        record=metadata.records.get(name, ""),
        shapes=f"{', '.join(described[:-1])} -> {described[-1]}",
        calls=calls,
        flops=round(work.flops_per_output * math.prod(tensors[-1][0])),
        bytes=sum(math.prod(shape) * numpy_dtype(dtype).itemsize for shape, dtype in tensors),
        matmul_dtype=tensors[1][1] if work.matmul else "float32",
        seconds=seconds,
    )
