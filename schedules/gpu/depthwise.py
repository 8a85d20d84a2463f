"""Depthwise convolutions on GPUs, with or without LayerNorm behind them, in one kernel."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Final

from tvm import s_tir, tirx
from tvm.s_tir.schedule import LoopRV
from tvm.target import Target

from dcnv3_tvm.gpu import WARP
from dcnv3_tvm.op.normalization import gathering
from dcnv3_tvm.op.stages import KERNEL_ATTR, static
from dcnv3_tvm.schedules.gpu.layer_norm import LANES, Channels, vector_elements
from dcnv3_tvm.schedules.gpu.threads import choose, unroll_all
from dcnv3_tvm.targets import is_gpu

_THREADS: Final = 128
"""Threads of a block."""

_SIDES: Final = (1, 2, 4, 8, 16, 32, 64, 128)
"""Rows, and runs in a row, of a block among which a tuner may choose."""

_RUNS: Final = (1, 2, 4, 8)
"""Neighbouring pixels of a thread."""

_MOST_SUMS: Final = 64
"""Sums that a thread keeps, where fewer are possible."""

_TOO_MANY_SUMS: Final = 160
"""Sums that do not fit the registers of a thread."""

_FULL_GPU: Final = 2**17
"""Threads that fill a large GPU once."""

_UNROLLED_WINDOW: Final = 49
"""Beyond, the loops over the window stay loops."""


def depthwise(func: tirx.PrimFunc, target: Target) -> tirx.PrimFunc | None:
    """Schedule depthwise convolutions of channels-last tensors.

    A block takes a tile of pixels and all channels, a thread a run of pixels of some vectors of
    channels. Row by row of the window it loads the pixels that its run sees, zeros beyond the
    border, and adds them to sums in registers, where LayerNorm and activation find them.
    """
    if func.attrs is None or func.attrs.get(KERNEL_ATTR) != "depthwise" or not is_gpu(target):
        return None
    func = gathering(func)
    tile = _tile(func)
    if tile is None:
        return None
    sch = s_tir.Schedule(func)
    epilogue, window = sch.get_sblock("epilogue"), sch.get_sblock("window")
    normalized = len(sch.get_consumers(window)) > 1
    batch, line, pixel, channel = sch.get_loops(epilogue)
    slab, line = sch.split(line, [None, choose(sch, _SIDES, tile.lines)])
    runs, run = choose(sch, _SIDES, tile.runs), choose(sch, _RUNS, tile.run)
    part, pixel, run = sch.split(pixel, [None, runs, run])
    sch.reorder(batch, slab, part, line, pixel, run)
    sch.bind(sch.fuse(batch, slab, part), "blockIdx.x")
    place = sch.fuse(line, pixel)
    sch.bind(place, "threadIdx.y")
    shared = Channels.of(sch, tile.lanes, tile.vector)
    shared.store(sch, epilogue, channel, [run])
    if normalized:
        shared.normalize(sch, place)
    _sum_window(sch, shared, place)
    return sch.mod["main"]


def _sum_window(sch: s_tir.Schedule, shared: Channels, place: LoopRV) -> None:
    """Sum the window of each pixel of a run, in registers."""
    window, image = sch.get_sblock("window"), sch.get_sblock("padded")
    sch.compute_at(window, place, preserve_unit_loops=True)
    sch.set_scope(window, 0, "local")
    *_, run, channel, high, wide = sch.get_loops(window)
    step = shared.split(sch, channel, [])
    element = sch.get_loops(window)[-3]
    sch.reorder(step, high, wide, run, element)
    unroll_all(sch, [run, element])
    if math.prod(static(sch.get(loop).extent) or 0 for loop in (high, wide)) <= _UNROLLED_WINDOW:
        unroll_all(sch, [high, wide])
    shared.load(sch, window, wide, ("weight",))
    for block in [*sch.get_consumers(image), image]:
        if sch.get(block).name_hint != "window":
            sch.compute_at(block, high, preserve_unit_loops=True)
            sch.set_scope(block, 0, "local")
            unroll_all(sch, sch.get_loops(block)[-2:])
    shared.vectorize(sch, image)
    first = sch.decompose_reduction(window, high)
    unroll_all(sch, sch.get_loops(first)[-2:])


@dataclasses.dataclass(frozen=True)
class _Tile:
    """What a block and a thread take.

    Parameters
    ----------
    lines, runs, run : int
        Rows of pixels of a block, runs of pixels in each, pixels of a run, which is a thread's.
    lanes, vector : int
        Threads that share the channels of a pixel; neighbouring channels that one takes together.
    """

    lines: int
    runs: int
    run: int
    lanes: int
    vector: int


def _tile(func: tirx.PrimFunc) -> _Tile | None:
    """Choose what seems to take the least time; None if no choice fits the registers."""
    x, weight, out = func.params[0], func.params[1], func.params[-1]
    kernel = [int(size) for size in weight.shape[:2]]
    channels = int(weight.shape[-1])
    vector = vector_elements(channels, [x, out])
    vectors = channels // vector
    batch, height, width = (static(size) or 64 for size in out.shape[:3])

    def cost(tile: _Tile) -> tuple[bool, float]:
        """Estimate the instructions of a thread times the turns in which the GPU has all."""
        steps = -(-vectors // tile.lanes)
        sums = tile.run * steps * vector
        loads = kernel[0] * (tile.run + kernel[1] - 1) / tile.run
        instructions = (
            loads * (1 + 4 / vector)
            + math.prod(kernel) * (1 + 1 / (4 * tile.run))
            + 4 * (math.log2(tile.lanes) + 1) * (1 if tile.lanes <= WARP else 3) / (steps * vector)
            + 3 * (1 + (kernel[0] - 1) / tile.lines)
            + 25
        )
        rows = _round_up(height, tile.lines)
        columns = _round_up(width, tile.runs * tile.run)
        threads = batch * rows * columns // tile.run * tile.lanes
        return sums > _MOST_SUMS, instructions * sums * max(threads, _FULL_GPU)

    tiles = [
        _Tile(lines, max(1, _THREADS // lanes) // lines, run, lanes, vector)
        for lanes, lines, run in itertools.product(LANES, _SIDES, _RUNS)
        if lanes < 2 * vectors and max(1, _THREADS // lanes) % lines == 0
    ]
    best = min(tiles, key=cost)
    sums = best.run * -(-vectors // best.lanes) * vector
    return best if sums <= _TOO_MANY_SUMS else None


def _round_up(size: int, step: int) -> int:
    return -(-size // step) * step
