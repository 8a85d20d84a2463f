"""Depthwise convolutions on GPUs, optionally followed by LayerNorm in the same kernel."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Final

from tvm import s_tir, tirx
from tvm.s_tir.schedule import LoopRV
from tvm.target import Target

from dcnv3_tvm.gpu import FULL_GPU_THREADS, WARP_SIZE, vector_elements
from dcnv3_tvm.op.expr import static
from dcnv3_tvm.schedules.gpu.launch import set_min_blocks
from dcnv3_tvm.schedules.gpu.layer_norm import LANES, ChannelThreads
from dcnv3_tvm.schedules.gpu.loops import bind_blocks, unroll_all, vectorize_copy
from dcnv3_tvm.schedules.rule import Refusal, refuse_other_kernels
from dcnv3_tvm.schedules.space import SearchSpace

_THREADS: Final = range(64, 513)
"""Possible numbers of threads of a block."""

_SIDES: Final = (1, 2, 4, 5, 7, 8, 14, 16, 32)
"""Candidates for the rows of a block, and for the runs in each."""

_RUNS: Final = (1, 2, 4, 5, 7, 8)
"""Candidates for the pixels of a run, which a thread computes. The kernel is built with one."""

_MOST_SUMS: Final = 64
"""Most sums of a thread, if any tile has fewer."""

_MOST_VALUES: Final = 96
"""Most sums and input values of a thread, if any tile has fewer."""

_MOST_REGISTER_VALUES: Final = 192
"""Sums and input values that fit the registers of a thread."""

_MOST_ROUNDED_UP: Final = 1.5
"""Most vectors of several warps, rounded up to whole turns, per actual vector. ptxas spills if few
threads have a vector in the last turn."""

_RUN_RANK: Final = 5
"""Rank of the sums of a kernel in runs: (n, ho, run, pixel, c)."""

_UNROLLED_WINDOW: Final = 49
"""Largest window whose loops are unrolled."""


def depthwise(func: tirx.PrimFunc, target: Target, space: SearchSpace) -> tirx.PrimFunc | Refusal:
    """Schedule depthwise convolutions of channels-last tensors.

    A block computes a tile of pixels with all channels, a thread a run of pixels with some vectors
    of channels. For each row of the window a thread loads the pixels that its run reads, zero
    outside the image, and accumulates in registers, where LayerNorm and activation read the sums.
    The kernel must be one in runs (`choose_run`).
    """
    if refusal := refuse_other_kernels(func, "depthwise"):
        return refusal

    # Step 1. Choose the tile of a block.
    sch = s_tir.Schedule(func)
    epilogue, window = sch.get_sblock("epilogue"), sch.get_sblock("window")
    shape = sch.get(window).writes[0].source.shape
    in_runs = len(shape) == _RUN_RANK
    tile = _choose_tile(func, [int(shape[-2])] if in_runs else _RUNS)
    if isinstance(tile, Refusal):
        return tile
    if not in_runs:
        return Refusal("needs the output pixels in runs")
    normalized = len(sch.get_consumers(window)) > 1
    batch, line, pixel, channel = sch.get_loops(epilogue)

    # Step 2. Bind pixels to blocks and threads.
    lines, runs = tile.lines, tile.runs
    if tile.lanes <= WARP_SIZE:
        lines = space.pick("lines", _SIDES, lines)
        runs = space.pick("runs", _SIDES, runs)
    slab, line = sch.split(line, [None, lines])
    part, pixel, run = sch.split(pixel, [None, runs, tile.run])
    sch.reorder(batch, slab, part, line, pixel, run)
    bind_blocks(sch, [batch, slab], [part])
    sch.bind(line, "threadIdx.z")
    sch.bind(pixel, "threadIdx.y")

    # Step 3. Bind channels to threads, from the output back to the input.
    threads = ChannelThreads.of(space, tile.lanes, tile.vector)
    threads.store(sch, epilogue, channel, [run])
    if normalized:
        threads.reduce(sch, pixel)
    _sum_window(sch, threads, pixel)
    return set_min_blocks(sch.mod["main"], target, space)


def choose_run(func: tirx.PrimFunc) -> int | None:
    """Choose the run length to build a depthwise kernel with, to schedule it here.

    Parameters
    ----------
    func : tvm.tirx.PrimFunc
        The kernel without runs.

    Returns
    -------
    int or None
        Pixels of a run; None if no tile fits the registers.
    """
    tile = _choose_tile(func, _RUNS)
    return None if isinstance(tile, Refusal) else tile.run


def _sum_window(sch: s_tir.Schedule, threads: ChannelThreads, pixel: LoopRV) -> None:
    """Sum the window of each pixel of a run in registers."""
    window, image = sch.get_sblock("window"), sch.get_sblock("padded")
    sch.compute_at(window, pixel, preserve_unit_loops=True)
    sch.set_scope(window, 0, "local")
    *_, run, channel, high, wide = sch.get_loops(window)
    step = threads.split(sch, channel, [])
    element = sch.get_loops(window)[-3]
    sch.reorder(step, high, wide, run, element)
    unroll_all(sch, [run, element])
    if math.prod(static(sch.get(loop).extent) or 0 for loop in (high, wide)) <= _UNROLLED_WINDOW:
        unroll_all(sch, [high, wide])
    threads.load(sch, window, wide, ("weight",))
    for block in [*sch.get_consumers(image), image]:
        if sch.get(block).name_hint != "window":
            sch.compute_at(block, high, preserve_unit_loops=True)
            sch.set_scope(block, 0, "local")
            unroll_all(sch, sch.get_loops(block)[-2:])
    vectorize_copy(sch, image, threads.vector)
    first = sch.decompose_reduction(window, high)
    unroll_all(sch, sch.get_loops(first)[-2:])


@dataclasses.dataclass(frozen=True)
class _Tile:
    """Tile of a thread block.

    Parameters
    ----------
    lines, runs, run : int
        Rows of pixels of a block, runs in each, and pixels of a run.
    lanes, vector : int
        Threads of a run, and neighbouring channels that a thread loads at once.
    """

    lines: int
    runs: int
    run: int
    lanes: int
    vector: int


def _choose_tile(func: tirx.PrimFunc, run_lengths: Sequence[int]) -> _Tile | Refusal:
    """Choose the tile of the least estimated time, if one fits the registers.

    The constants are taken from machine code for several tiles: some 150 instructions a thread, 25
    for LayerNorm and GELU of a channel, 8 for the address and border test of a vector, and about
    half as many again of all if the last tile of an axis is not whole.
    """
    x, weight, out = func.params[0], func.params[1], func.params[-1]
    high, wide = (int(size) for size in weight.shape[:2])
    channels = int(weight.shape[-1])
    vector = vector_elements(channels, str(x.dtype), str(out.dtype))
    vectors = channels // vector
    batch, height, width = (static(size) or 64 for size in out.shape[:3])

    def sums(tile: _Tile) -> int:
        return tile.run * -(-vectors // tile.lanes) * vector

    def values(tile: _Tile) -> int:
        return sums(tile) + (tile.run + wide - 1) * vector

    def cost(tile: _Tile) -> tuple[bool, float]:
        """Estimate the instructions of a thread times the waves of threads."""
        pixels = tile.runs * tile.run
        halo = (1 + (high - 1) / tile.lines) * (1 + (wide - 1) / pixels)
        exchange = 4 * (math.log2(tile.lanes) + 1) * (1 if tile.lanes <= WARP_SIZE else 3)
        instructions = (
            high * (1 + (wide - 1) / tile.run) * (1 + 8 / vector)
            + high * wide * (1 + 1 / (4 * tile.run))
            + (exchange * tile.run + 150) / sums(tile)
            + 2 * halo
            + 25
        )
        rows, columns = _round_up(height, tile.lines), _round_up(width, pixels)
        block = tile.lines * tile.runs * tile.lanes
        threads = (
            batch * rows * columns // tile.run * tile.lanes * _round_up(block, WARP_SIZE) // block
        )
        whole = (rows, columns, vectors % tile.lanes) == (height, width, 0)
        time = instructions * sums(tile) * max(threads, FULL_GPU_THREADS) * (1.0 if whole else 1.4)
        too_many = sums(tile) > _MOST_SUMS or values(tile) > _MOST_VALUES
        return too_many, time

    def few_idle(lanes: int) -> bool:
        return vectors <= lanes or _round_up(vectors, lanes) <= _MOST_ROUNDED_UP * vectors

    tiles = [
        _Tile(lines, runs, run, lanes, vector)
        for lines, runs, run, lanes in itertools.product(_SIDES, _SIDES, run_lengths, LANES)
        if lanes < 2 * vectors
        and lines * runs * lanes in _THREADS
        and (lanes <= WARP_SIZE or (lines == runs == 1 and few_idle(lanes)))
    ]
    best = min(tiles, key=cost)
    if values(best) > _MOST_REGISTER_VALUES:
        return Refusal(
            f"keeps at most {_MOST_REGISTER_VALUES} values in the registers of a thread; "
            f"{channels} channels with a {high}x{wide} window need {values(best)}"
        )
    return best


def _round_up(size: int, step: int) -> int:
    return -(-size // step) * step
