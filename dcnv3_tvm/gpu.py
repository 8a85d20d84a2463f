"""NVIDIA GPUs: limits of the architectures, and the devices of this machine.

Devices are queried through the driver's library; neither PyTorch, TVM nor a CUDA toolkit is needed.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import math
from typing import Any, Final

from dcnv3_tvm.dtypes import DTYPE_BYTES
from dcnv3_tvm.errors import TargetError

_DRIVER: Final = "libcuda.so.1"
_COMPUTE_MAJOR, _COMPUTE_MINOR = 75, 76
_EMBEDDED: Final = frozenset({"sm_87"})
_NAME_LENGTH: Final = 256


@dataclasses.dataclass(frozen=True)
class Architecture:
    """Limits of a streaming multiprocessor (SM), from the CUDA programming guide.

    Parameters
    ----------
    threads : int
        Maximum resident threads.
    blocks : int
        Maximum resident thread blocks.
    shared_bytes : int
        Shared memory of the SM; a block can use `RESERVED_SHARED` less.
    """

    threads: int
    blocks: int
    shared_bytes: int

    @property
    def block_shared_bytes(self) -> int:
        """Maximum shared memory of a block."""
        return self.shared_bytes - RESERVED_SHARED


RESERVED_SHARED: Final = 1024
"""Bytes of shared memory that CUDA reserves in every block."""

SM_REGISTERS: Final = 65536
"""32-bit registers of an SM, on all `ARCHITECTURES`."""

MAX_BLOCK_THREADS: Final = 1024
"""Maximum threads of a block, on all `ARCHITECTURES`."""

WARP_SIZE: Final = 32
"""Threads of a warp."""

VECTOR_BYTES: Final = 16
"""Bytes of the widest load or store of a thread, and the alignment of its address."""

FRAGMENT: Final = 16
"""Rows, columns and depth of the tiles that tensor cores multiply."""

HIDDEN_SLAB: Final = 32
"""Hidden features that a fused MLP kernel computes at a time."""

FULL_GPU_BLOCKS: Final = 132
"""Thread blocks that put one on every SM of a large GPU."""

FULL_GPU_THREADS: Final = 2**17
"""Threads that occupy a large GPU once; with fewer in total, each should do less."""

BANDWIDTH_THREADS: Final = 2**15
"""Threads that saturate the memory bandwidth of a large GPU."""

ARCHITECTURES: Final = {
    "sm_80": Architecture(threads=2048, blocks=32, shared_bytes=164 * 1024),
    "sm_86": Architecture(threads=1536, blocks=16, shared_bytes=100 * 1024),
    "sm_87": Architecture(threads=1536, blocks=16, shared_bytes=164 * 1024),
    "sm_89": Architecture(threads=1536, blocks=24, shared_bytes=100 * 1024),
    "sm_90": Architecture(threads=2048, blocks=32, shared_bytes=228 * 1024),
    "sm_100": Architecture(threads=2048, blocks=32, shared_bytes=228 * 1024),
    "sm_120": Architecture(threads=1536, blocks=24, shared_bytes=100 * 1024),
}
"""Supported architectures: those with bfloat16 tensor cores and asynchronous copies to shared
memory."""


def vector_elements(extent: int, *dtypes: str) -> int:
    """Return how many neighbouring elements of an axis one load or store moves.

    Parameters
    ----------
    extent : int
        Length of the axis, of which the result is a divisor.
    *dtypes : str
        Element types of the tensors; the smallest one counts.

    Examples
    --------
    >>> vector_elements(64, "float32"), vector_elements(20, "float16", "float32")
    (4, 4)
    """
    smallest = min(DTYPE_BYTES.get(dtype, VECTOR_BYTES) for dtype in dtypes)
    return math.gcd(extent, VECTOR_BYTES // smallest)


def runs_on(compiled: str, present: str) -> bool:
    """Return whether machine code for one architecture runs on another.

    It runs on later minor versions of the same major version (code for 8.6 on 8.9) that have at
    least as much shared memory. Code for embedded GPUs runs only on the same architecture.

    Parameters
    ----------
    compiled : str
        Architecture of the code, for example ``"sm_90"``.
    present : str
        Architecture of the GPU.

    Examples
    --------
    >>> runs_on("sm_86", "sm_89"), runs_on("sm_80", "sm_86"), runs_on("sm_90", "sm_100")
    (True, False, False)
    """
    if compiled == present:
        return True
    if not {compiled, present} <= ARCHITECTURES.keys() - _EMBEDDED:
        return False
    (code_major, code_minor), (gpu_major, gpu_minor) = (
        divmod(int(arch.removeprefix("sm_")), 10) for arch in (compiled, present)
    )
    enough = ARCHITECTURES[present].shared_bytes >= ARCHITECTURES[compiled].shared_bytes
    return code_major == gpu_major and code_minor <= gpu_minor and enough


def target_name(arch: str) -> str:
    """Return the target for an architecture, for example ``"cuda-sm90"`` for ``"sm_90"``."""
    return f"cuda-{arch.replace('_', '')}"


@dataclasses.dataclass(frozen=True)
class GpuInfo:
    """A GPU of this machine.

    Parameters
    ----------
    index : int
        CUDA's index of the device.
    name : str
        For example ``"NVIDIA H200"``.
    arch : str
        For example ``"sm_90"``.
    total_bytes : int
        Size of its memory.
    """

    index: int
    name: str
    arch: str
    total_bytes: int


@functools.cache
def devices() -> tuple[GpuInfo, ...]:
    """List the GPUs of this machine; empty without a driver."""
    driver = _driver()
    count = ctypes.c_int(0)
    if driver is None or driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return ()
    return tuple(_describe(driver, index) for index in range(count.value))


def device(index: int = 0) -> GpuInfo:
    """Return a GPU of this machine.

    Raises
    ------
    TargetError
        If the machine has no such GPU.
    """
    found = devices()
    if not found:
        raise TargetError(
            "this machine has no NVIDIA GPU, or no driver for it",
            got=f"no {_DRIVER} that lists a device",
            hint="Check that nvidia-smi lists the GPU; to compile for another machine, name its "
            'architecture: target="cuda-sm90".',
        )
    if not 0 <= index < len(found):
        raise TargetError(
            "the GPU does not exist",
            got=f"cuda:{index}",
            allowed=", ".join(f"cuda:{gpu.index} ({gpu.name})" for gpu in found),
        )
    return found[index]


def driver_version() -> tuple[int, int] | None:
    """Return the newest CUDA version the driver supports, such as (13, 0); None if no driver."""
    driver = _driver()
    version = ctypes.c_int(0)
    if driver is None or driver.cuDriverGetVersion(ctypes.byref(version)) != 0:
        return None
    return version.value // 1000, version.value % 1000 // 10


def _driver() -> Any | None:
    try:
        driver = ctypes.CDLL(_DRIVER)
    except OSError:
        return None
    return driver if driver.cuInit(0) == 0 else None


def _describe(driver: Any, index: int) -> GpuInfo:
    handle = ctypes.c_int()
    driver.cuDeviceGet(ctypes.byref(handle), index)
    name = ctypes.create_string_buffer(_NAME_LENGTH)
    driver.cuDeviceGetName(name, _NAME_LENGTH, handle)
    total = ctypes.c_size_t()
    driver.cuDeviceTotalMem_v2(ctypes.byref(total), handle)

    def attribute(number: int) -> int:
        value = ctypes.c_int()
        driver.cuDeviceGetAttribute(ctypes.byref(value), number, handle)
        return value.value

    return GpuInfo(
        index=index,
        name=name.value.decode(),
        arch=f"sm_{attribute(_COMPUTE_MAJOR)}{attribute(_COMPUTE_MINOR)}",
        total_bytes=total.value,
    )
