"""Measure the peak arithmetic rate and memory bandwidth of this machine's CPU."""

# No `from __future__ import annotations`: the TVMScript parser evaluates the annotations.
import functools
import time
from collections.abc import Callable
from typing import Any, Final

import numpy as np

from dcnv3_tvm import machine, targets
from dcnv3_tvm.bench.roofline import Peaks
from dcnv3_tvm.kernels.packing import BLOCK, TILE
from dcnv3_tvm.kernels.tile_functions import BEGIN, END, IMPORT_CODE, SUM_BLOCK
from dcnv3_tvm.runtime import library
from dcnv3_tvm.schedules.cpu.amx import AMX_CODE

_CHAINS: Final = 12
"""Independent accumulators per thread, enough to hide the latency of a multiply-add."""

_STEPS: Final = 200_000
_TILE_BLOCKS: Final = 1000
_TILE_STEPS: Final = 10
"""Steps of a block of sums in matrix tiles, whose operands stay in the L1 cache."""

_COPIED: Final = 64 * 2**20
_SECONDS: Final = 0.7
_BURSTS: Final = 5
_PAUSE: Final = 0.1
_OF_TILES: Final = ", and of AMX tiles with operands in the L1 cache"


@functools.lru_cache(maxsize=8)
def measure_peaks(threads: int) -> Peaks:
    """Measure the peak rates with a number of threads; takes about two seconds."""
    target = targets.resolve_target("auto")
    lanes = targets.vector_lanes(target, "float32")
    library.use_threads(threads)
    sums = np.zeros((threads, _CHAINS * lanes), np.float32)
    flops = 2 * _STEPS * sums.size
    add = _compiled(_multiply_adds(threads, lanes), sums)
    tile_flops = None
    if targets.has_amx(target) and machine.enable_amx():
        operand = np.zeros((2, _TILE_STEPS, BLOCK * BLOCK), np.uint16)
        multiply = _compiled(_tile_blocks(threads), operand, np.zeros((threads, BLOCK, BLOCK), "f"))
        tile_flops = 2 * threads * _TILE_BLOCKS * _TILE_STEPS * BLOCK**3 / _best(multiply)
    source = np.ones((threads, _COPIED // 4 // threads), np.float32)
    copy = _compiled(_copy(*source.shape), source, np.empty_like(source))
    return Peaks(
        flops=flops / _best(add),
        bytes=2 * source.nbytes / _best(copy),
        how="measured at the start: a loop of multiply-adds in registers"
        f"{_OF_TILES if tile_flops else ''}; a copy of "
        f"{_COPIED >> 20} MiB with ordinary stores",
        half_flops=tile_flops,
    )


def _compiled(function: Any, *arrays: Any) -> Callable[[], Any]:
    import tvm

    executable = tvm.compile(function, target=targets.resolve_target("auto"))
    tensors = [tvm.runtime.tensor(array) for array in arrays]
    main = executable["main"]
    return lambda: main(*tensors)


def _best(call: Callable[[], Any]) -> float:
    """Return the best time of a call in several bursts.

    The operating system may keep two threads on one core for the length of a burst.
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


def _tile_blocks(threads: int) -> Any:
    from tvm.script import tirx as T

    steps, blocks, row = _TILE_STEPS, _TILE_BLOCKS, 2 * _TILE_STEPS * BLOCK

    @T.prim_func(s_tir=True)
    def main(operands: T.handle, sums: T.handle):
        Operands = T.match_buffer(operands, (2, steps, BLOCK * BLOCK), "uint16")
        Sums = T.match_buffer(sums, (threads, BLOCK, BLOCK), "float32")
        for t in T.parallel(threads, annotations={IMPORT_CODE: AMX_CODE}):
            T.evaluate(T.call_extern("int32", BEGIN, T.int64(TILE)))
            for _ in T.serial(blocks):
                T.evaluate(
                    T.call_extern(
                        "int32",
                        SUM_BLOCK,
                        T.address_of(Sums[t, 0, 0]),
                        T.address_of(Operands[0, 0, 0]),
                        T.int64(row),
                        T.int64(row * TILE),
                        T.int64(1),
                        T.int64(0),
                        T.address_of(Operands[1, 0, 0]),
                        T.int64(steps),
                        T.int64(2 * BLOCK * (steps - 1)),
                        T.int64(TILE),
                        T.int64(TILE),
                        T.address_of(Operands[1, 0, 0]),
                        T.int32(0),
                        T.int64(1),
                    )
                )
            T.evaluate(T.call_extern("int32", END))

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
