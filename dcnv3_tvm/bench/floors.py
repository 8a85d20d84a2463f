"""What the machine can do at best, measured: the floors that times are put beside."""

# No `from __future__ import annotations`: the TVMScript parser evaluates the annotations.
import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any, Final

import numpy as np

from dcnv3_tvm import targets
from dcnv3_tvm.dtypes import DTYPE_BYTES
from dcnv3_tvm.runtime import library

_CHAINS: Final = 12
"""Independent sums a thread works on: more than the latency of a multiply-add needs."""

RATES: Final = {"float32": 1.0, "bfloat16": 2.0}
"""Rates of products by dtype, over that of multiply-adds in float32, which is what is measured.

In bfloat16 an instruction that multiplies and adds two numbers in each lane of float32 takes the
time of one that does so with one. A whole encoder is taken at this rate, though its sampling and
all else is float32: its floor stays one.
"""

_STEPS: Final = 200_000
_COPIED: Final = 64 * 2**20
_SECONDS: Final = 0.7
_BURSTS: Final = 5
_PAUSE: Final = 0.1


@dataclasses.dataclass(frozen=True)
class Peaks:
    """Rates of a machine: of a CPU with some number of threads, or of a GPU.

    Parameters
    ----------
    flops : float
        Floating-point operations a second in float32; a multiply-add counts as two.
    bytes : float
        Bytes a second of a copy larger than the caches, reads and writes counted.
    how : str
        Where the rates are from.
    half_flops : float or None
        Operations a second of products of 16-bit numbers on a GPU's tensor cores; None on a CPU.
    """

    flops: float
    bytes: float
    how: str
    half_flops: float | None = None

    def flops_in(self, dtype: str) -> float:
        """Return the rate of products of a dtype: on a CPU see `RATES`."""
        if self.half_flops is not None and DTYPE_BYTES[dtype] == 2:
            return self.half_flops
        return RATES[dtype] * self.flops


@dataclasses.dataclass(frozen=True)
class Floors:
    """Least times of a problem, in seconds.

    Parameters
    ----------
    copy : float
        To read its inputs and weights once and write its outputs once.
    arithmetic : float
        To do its multiplications and additions.
    """

    copy: float
    arithmetic: float

    @classmethod
    def of(cls, work: float, traffic: float, peaks: Peaks, dtype: str = "float32") -> "Floors":
        """Divide operations and bytes by the machine's rates for products of a dtype."""
        return cls(copy=traffic / peaks.bytes, arithmetic=work / peaks.flops_in(dtype))


@functools.lru_cache(maxsize=8)
def measure_peaks(threads: int) -> Peaks:
    """Measure the machine for some two seconds, with kernels of our own.

    Parameters
    ----------
    threads : int
        Threads that compute at once.
    """
    lanes = targets.vector_lanes(targets.resolve_target("auto"), "float32")
    library.use_threads(threads)
    sums = np.zeros((threads, _CHAINS * lanes), np.float32)
    work = 2 * _STEPS * sums.size
    add = _compiled(_multiply_adds(threads, lanes), sums)
    source = np.ones((threads, _COPIED // 4 // threads), np.float32)
    copy = _compiled(_copy(*source.shape), source, np.empty_like(source))
    return Peaks(
        flops=work / _best(add),
        bytes=2 * source.nbytes / _best(copy),
        how="measured at the start: a loop of multiply-adds in registers; a copy of "
        f"{_COPIED >> 20} MiB with ordinary stores",
    )


def _compiled(function: Any, *arrays: Any) -> Callable[[], Any]:
    import tvm

    executable = tvm.compile(function, target=targets.resolve_target("auto"))
    tensors = [tvm.runtime.tensor(array) for array in arrays]
    main = executable["main"]
    return lambda: main(*tensors)


def _best(call: Callable[[], Any]) -> float:
    """Call for a while and return the best time: a floor is what the machine can do undisturbed.

    In bursts, because for the length of one the system may keep two threads on one core.
    """
    times: list[float] = []
    for _ in range(_BURSTS):
        start = time.perf_counter()
        while True:
            before = time.perf_counter()
            call()
            after = time.perf_counter()
            times.append(after - before)
            if after - start > _SECONDS / _BURSTS:
                break
        time.sleep(_PAUSE)
    return min(times)


def _multiply_adds(threads: int, lanes: int) -> Any:
    from tvm.script import tirx as T

    chains, steps = _CHAINS, _STEPS

    @T.prim_func(s_tir=True)
    def main(sums: T.handle):
        Sums = T.match_buffer(sums, (threads, chains * lanes), "float32")
        for t in T.parallel(threads):
            with T.sblock("chains"):
                row = T.axis.spatial(threads, t)
                local = T.sblock_alloc_buffer((chains * lanes,), "float32", scope="local")
                for c in T.unroll(chains):
                    for v in T.vectorized(lanes):
                        local[c * lanes + v] = Sums[row, c * lanes + v]
                for _step in T.serial(steps):
                    for c in T.unroll(chains):
                        for v in T.vectorized(lanes):
                            local[c * lanes + v] = local[c * lanes + v] * T.float32(
                                0.5
                            ) + T.float32(1.0)
                for c in T.unroll(chains):
                    for v in T.vectorized(lanes):
                        Sums[row, c * lanes + v] = local[c * lanes + v]

    return main


def _copy(threads: int, count: int) -> Any:
    from tvm.script import tirx as T

    @T.prim_func(s_tir=True)
    def main(source: T.handle, destination: T.handle):
        Source = T.match_buffer(source, (threads, count), "float32")
        Destination = T.match_buffer(destination, (threads, count), "float32")
        for t in T.parallel(threads):
            for i in T.serial(count):
                with T.sblock("copy"):
                    row, column = T.axis.remap("SS", [t, i])
                    Destination[row, column] = Source[row, column]

    return main
