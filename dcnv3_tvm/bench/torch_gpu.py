"""A GPU through PyTorch: event timing, L2 flush, peak memory and peak rates."""

from __future__ import annotations

import gc
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import torch

from dcnv3_tvm import gpu
from dcnv3_tvm.bench.roofline import Peaks
from dcnv3_tvm.errors import MissingDependencyError

_DRIVER: Final = Path("/proc/driver/nvidia/version")
_COPIED: Final = 2**30
_MATRIX_SIZE: Final = 8192
_CALLS: Final = 5
_MEMORY_CALLS: Final = 3


class TorchGpu:
    """A GPU of this machine.

    Parameters
    ----------
    index : int
        Index of the GPU.

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
                "PyTorch cannot use the GPU",
                got=f"torch {torch.__version__}",
                hint="Install a build of PyTorch for CUDA.",
            )
        torch.cuda.set_device(index)
        self.torch_device = torch.device("cuda", index)
        self.name = found.name
        self.slug = gpu_slug(found.name)
        self.target = gpu.target_name(found.arch)
        self._l2_bytes = int(torch.cuda.get_device_properties(index).L2_cache_size)
        event: Any = torch.cuda.Event
        self._events = event(enable_timing=True), event(enable_timing=True)

    def seconds_of(self, call: Callable[[], Any]) -> float:
        """Make a call and return its time on the stream."""
        return event_seconds(call, *self._events)

    def flush(self, repeats: int = 1) -> Callable[[], None]:
        """Return a call that evicts the L2 cache by writing a buffer twice its size.

        Several repeats keep the GPU busy for tenths of a millisecond, so that the host runs ahead
        and the kernels of the next call do not wait for their launch.
        """
        buffer = torch.empty(2 * self._l2_bytes, dtype=torch.uint8, device=self.torch_device)

        def write() -> None:
            for _ in range(repeats):
                buffer.zero_()

        return write

    def peak_bytes(self, call: Callable[[], Any]) -> int:
        """Return the peak memory that PyTorch allocates during some calls."""
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        for _ in range(_MEMORY_CALLS):
            call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def release(self) -> None:
        """Free unused memory.

        Raises
        ------
        RuntimeError
            If a kernel has failed, after which this process cannot use the GPU.
        """
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()

    def peaks(self) -> Peaks:
        """Measure the peak rates with PyTorch; takes some seconds."""
        options: dict[str, Any] = {"device": self.torch_device}
        source = torch.ones(_COPIED // 4, **options)
        copy = torch.empty_like(source)
        single = torch.randn(_MATRIX_SIZE, _MATRIX_SIZE, **options)
        half = single.half()
        flops = 2.0 * _MATRIX_SIZE**3
        return Peaks(
            flops=flops / self._best(lambda: single @ single),
            bytes=2 * _COPIED / self._best(lambda: copy.copy_(source)),
            how=f"measured at the start with PyTorch: a copy of {_COPIED >> 20} MiB; matmuls of "
            f"{_MATRIX_SIZE}x{_MATRIX_SIZE} matrices, float32 on CUDA cores, float16 on tensor "
            "cores",
            half_flops=flops / self._best(lambda: half @ half),
        )

    def _best(self, call: Callable[[], Any]) -> float:
        return min(self.seconds_of(call) for _ in range(_CALLS))

    @property
    def driver(self) -> str | None:
        """Version of the driver; None if the system does not report it."""
        return read_driver_version(_DRIVER)


def event_seconds(call: Callable[[], Any], start: Any, end: Any) -> float:
    """Make a call between two CUDA events and return the time between them."""
    start.record()
    call()
    end.record()
    end.synchronize()
    return 1e-3 * float(start.elapsed_time(end))


def gpu_slug(name: str) -> str:
    """Shorten the name of a GPU for file names.

    Examples
    --------
    >>> gpu_slug("NVIDIA H200"), gpu_slug("NVIDIA H100 80GB HBM3")
    ('h200', 'h100')
    >>> gpu_slug("NVIDIA A100-SXM4-80GB"), gpu_slug("NVIDIA GeForce RTX 4090")
    ('a100', 'rtx4090')
    """
    words = re.findall(r"[a-z0-9]+", name.lower())
    words = [word for word in words if word not in ("nvidia", "geforce", "tesla", "graphics")]
    model = next((i for i, word in enumerate(words) if re.search(r"\d", word)), None)
    return "".join(words if model is None else words[: model + 1]) or "gpu"


def read_driver_version(path: Path) -> str | None:
    """Read the driver version from the file that the kernel module provides."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError:
        return None
    found = re.search(r"\b\d+\.\d+(?:\.\d+)?\b", text)
    return None if found is None else found[0]
