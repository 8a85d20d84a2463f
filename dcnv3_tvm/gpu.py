"""NVIDIA GPUs: what an architecture offers, and which devices this machine has.

The devices are asked of the driver's library, which is there wherever a GPU is: no PyTorch, no
TVM and no CUDA toolkit is needed.
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
_COMPUTE_MAJOR, _COMPUTE_MINOR, _PROCESSORS = 75, 76, 16
_EMBEDDED: Final = frozenset({"sm_87"})
_NAME_LENGTH: Final = 256


@dataclasses.dataclass(frozen=True)
class Architecture:
    """What a multiprocessor of an architecture offers, from the CUDA programming guide.

    Parameters
    ----------
    threads : int
        Most resident threads.
    blocks : int
        Most resident blocks.
    shared_bytes : int
        Shared memory of the multiprocessor; a block can have `RESERVED_SHARED` less.
    """

    threads: int
    blocks: int
    shared_bytes: int

    @property
    def block_shared_bytes(self) -> int:
        """Most shared memory of a block."""
        return self.shared_bytes - RESERVED_SHARED


RESERVED_SHARED: Final = 1024
"""Bytes of shared memory that the system reserves in every block."""

SM_REGISTERS: Final = 65536
"""32-bit registers of a multiprocessor, in all `ARCHITECTURES`."""

MAX_BLOCK_THREADS: Final = 1024
"""Most threads of a block, in all `ARCHITECTURES`."""

WARP_SIZE: Final = 32
"""Threads of a warp."""

VECTOR_BYTES: Final = 16
"""Bytes of the widest load or store of a thread, and the alignment of its address."""

FRAGMENT: Final = 16
"""Rows, columns and depth of the tiles that tensor cores multiply."""

FULL_GPU_BLOCKS: Final = 132
"""Blocks that give every multiprocessor of a large GPU one."""

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
"""Architectures that kernels are scheduled for: those with tensor cores for bfloat16 and copies
into shared memory that bypass registers."""


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
    """Tell whether machine code for one architecture runs on another.

    It does on later versions of the same generation (the code for 8.6 on 8.9), as long as a block
    can have as much shared memory there. Embedded GPUs stand alone.

    Parameters
    ----------
    compiled : str
        The architecture of the code, for example ``"sm_90"``.
    present : str
        The architecture of the GPU.

    Examples
    --------
    >>> runs_on("sm_86", "sm_89"), runs_on("sm_80", "sm_86"), runs_on("sm_90", "sm_100")
    (True, False, False)
    """
    if compiled == present:
        return True
    if not {compiled, present} <= ARCHITECTURES.keys() - _EMBEDDED:
        return False
    (generation, version), (their_generation, their_version) = (
        divmod(int(arch.removeprefix("sm_")), 10) for arch in (compiled, present)
    )
    enough = ARCHITECTURES[present].shared_bytes >= ARCHITECTURES[compiled].shared_bytes
    return generation == their_generation and version <= their_version and enough


@dataclasses.dataclass(frozen=True)
class GpuInfo:
    """A GPU of this machine.

    Parameters
    ----------
    index : int
        Its number, as CUDA counts.
    name : str
        For example ``"NVIDIA H200"``.
    arch : str
        For example ``"sm_90"``.
    total_bytes : int
        Its memory.
    processors : int
        Its multiprocessors.
    """

    index: int
    name: str
    arch: str
    total_bytes: int
    processors: int


@functools.cache
def devices() -> tuple[GpuInfo, ...]:
    """List the GPUs of this machine; none where there is no driver."""
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
        If there is no such GPU.
    """
    found = devices()
    if not found:
        raise TargetError(
            "this machine has no NVIDIA GPU, or no driver for it",
            got=f"no {_DRIVER} that lists a device",
            hint="Check that nvidia-smi shows the GPU; to compile for another machine, name its "
            'architecture: target="cuda-sm90" (--target cuda-sm90).',
        )
    if not 0 <= index < len(found):
        raise TargetError(
            "there is no such GPU",
            got=f"cuda:{index}",
            allowed=", ".join(f"cuda:{gpu.index} ({gpu.name})" for gpu in found),
        )
    return found[index]


def kernel_ready(tensor: Any) -> Any:
    """Return a PyTorch tensor on a GPU as kernels take it: contiguous and aligned."""
    dense = tensor.detach().contiguous()
    return dense.clone() if dense.data_ptr() % VECTOR_BYTES else dense


def driver_version() -> tuple[int, int] | None:
    """Return the newest CUDA that the driver supports, such as (13, 0); None without a driver."""
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
        processors=attribute(_PROCESSORS),
    )
