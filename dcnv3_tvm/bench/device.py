"""A GPU as something to measure on: its clock, its cache, its memory and what it can do at best."""

from __future__ import annotations

import gc
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from dcnv3_tvm import gpu
from dcnv3_tvm.bench.contestants import NORM
from dcnv3_tvm.bench.floors import Peaks
from dcnv3_tvm.errors import MissingDependencyError

_DRIVER: Final = Path("/proc/driver/nvidia/version")
_COPIED: Final = 2**30
_SIZE: Final = 8192
_CALLS: Final = 5
_PEAK_CALLS: Final = 3
_CHUNK: Final = 8


class Device:
    """A GPU of this machine, as PyTorch sees it.

    Parameters
    ----------
    index : int
        Its number.

    Raises
    ------
    TargetError
        If there is no such GPU.
    MissingDependencyError
        If PyTorch cannot use it.
    """

    def __init__(self, index: int = 0) -> None:
        found = gpu.device(index)
        if not torch.cuda.is_available():
            raise MissingDependencyError(
                "PyTorch cannot use the GPU that the driver shows",
                got=f"torch {torch.__version__}",
                hint="Install a build of PyTorch for CUDA.",
            )
        torch.cuda.set_device(index)
        self.torch_device = torch.device("cuda", index)
        self.name = found.name
        self.slug = device_slug(found.name)
        self.target = f"cuda-{found.arch.replace('_', '')}"
        self._l2_bytes = int(torch.cuda.get_device_properties(index).L2_cache_size)
        event: Any = torch.cuda.Event
        self._events = event(enable_timing=True), event(enable_timing=True)

    def seconds_of(self, call: Callable[[], Any]) -> float:
        """Make a call and return the time from when its stream reaches it to its end."""
        return event_seconds(call, *self._events)

    def flush(self, repeats: int = 1) -> Callable[[], None]:
        """Return what drives everything out of the L2 cache: it writes a buffer twice as large.

        With more `repeats` it takes the GPU some tenths of a millisecond, in which the host gets
        ahead: then a call's kernels wait for each other, and not for the host.
        """
        buffer = torch.empty(2 * self._l2_bytes, dtype=torch.uint8, device=self.torch_device)

        def write() -> None:
            for _ in range(repeats):
                buffer.zero_()

        return write

    def peak_bytes(self, call: Callable[[], Any]) -> int:
        """Call some times and return the most memory that was allocated meanwhile."""
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        for _ in range(_PEAK_CALLS):
            call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def release(self) -> None:
        """Give back memory that nothing holds any more.

        Raises
        ------
        RuntimeError
            If the GPU has failed: then nothing can be computed on it in this process.
        """
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()

    def peaks(self) -> Peaks:
        """Measure the GPU for some seconds, with PyTorch."""
        options: dict[str, Any] = {"device": self.torch_device}
        source = torch.ones(_COPIED // 4, **options)
        copy = torch.empty_like(source)
        wide = torch.randn(_SIZE, _SIZE, **options)
        short = wide.half()
        products = 2.0 * _SIZE**3
        return Peaks(
            flops=products / self._best(lambda: wide @ wide),
            bytes=2 * _COPIED / self._best(lambda: copy.copy_(source)),
            how=f"measured at the start by PyTorch: a copy of {_COPIED >> 20} MiB; products of two "
            f"matrices of {_SIZE}x{_SIZE}, of float32 on CUDA cores, of float16 on tensor cores",
            half_flops=products / self._best(lambda: short @ short),
        )

    def _best(self, call: Callable[[], Any]) -> float:
        return min(self.seconds_of(call) for _ in range(_CALLS))

    @property
    def driver(self) -> str | None:
        """Version of the driver; None where the system does not tell."""
        return driver_version(_DRIVER)


def event_seconds(call: Callable[[], Any], start: Any, end: Any) -> float:
    """Make a call between two events of the present stream and return the time between them."""
    start.record()
    call()
    end.record()
    end.synchronize()
    return 1e-3 * float(start.elapsed_time(end))


def device_slug(name: str) -> str:
    """Name a GPU for files.

    Examples
    --------
    >>> device_slug("NVIDIA H200"), device_slug("NVIDIA H100 80GB HBM3")
    ('h200', 'h100')
    >>> device_slug("NVIDIA A100-SXM4-80GB"), device_slug("NVIDIA GeForce RTX 4090")
    ('a100', 'rtx4090')
    """
    words = re.findall(r"[a-z0-9]+", name.lower())
    words = [word for word in words if word not in ("nvidia", "geforce", "tesla", "graphics")]
    numbered = next((place for place, word in enumerate(words) if re.search(r"\d", word)), None)
    return "".join(words if numbered is None else words[: numbered + 1]) or "gpu"


def driver_version(path: Path) -> str | None:
    """Read the version of the driver from the file in which the kernel tells it."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError:
        return None
    found = re.search(r"\b\d+\.\d+(?:\.\d+)?\b", text)
    return None if found is None else found[0]


def tensor_error(outputs: Sequence[Tensor], reference: Sequence[Tensor], measure: str) -> float:
    """Return the largest error over all outputs, as `dcnv3_tvm.bench.contestants.error_of` does.

    Computed where the tensors are, some images at a time.
    """
    if len(outputs) != len(reference):
        return float("nan")
    errors = []
    for output, truth in zip(outputs, reference, strict=True):
        if output.shape != truth.shape:
            return float("nan")
        wrong, size = truth.new_zeros(()), truth.new_zeros(())
        for start in range(0, len(truth), _CHUNK):
            exact = truth[start : start + _CHUNK]
            difference = output[start : start + _CHUNK].to(exact.dtype) - exact
            if measure == NORM:
                wrong, size = wrong + difference.square().sum(), size + exact.square().sum()
            else:
                wrong = torch.maximum(wrong, difference.abs().amax())
                size = torch.maximum(size, exact.abs().amax())
        if measure == NORM:
            wrong, size = wrong.sqrt(), size.sqrt()
        errors.append(float(wrong) / (float(size) or 1.0))
    return max(errors, key=lambda error: (error != error, error))
