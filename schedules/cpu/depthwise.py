"""Depthwise convolutions on CPUs, optionally followed by LayerNorm in the same kernel."""

from __future__ import annotations

from typing import Final

from tvm import s_tir, tirx
from tvm.target import Target
from tvm_ffi import structural_equal

from dcnv3_tvm.op.expr import static
from dcnv3_tvm.schedules.cpu.layer_norm import normalize_rows, pick_rows
from dcnv3_tvm.schedules.cpu.loops import (
    accumulate_tile,
    copy_in_task,
    vector_width,
    vectorize_innermost,
)
from dcnv3_tvm.schedules.cpu.register_tiles import (
    vector_unit,
)
from dcnv3_tvm.schedules.rule import Refusal, refuse_other_kernels
from dcnv3_tvm.schedules.space import SearchSpace

_PIXELS: Final = 8
"""Most neighbouring pixels whose sums are in registers."""

_FEWEST_PIXELS: Final = 4
"""Fewest neighbouring pixels with an input of their own."""

_SLICE_VECTORS: Final = 4
"""Vectors of channels whose input is padded at once."""


def depthwise(func: tirx.PrimFunc, target: Target, space: SearchSpace) -> tirx.PrimFunc | Refusal:
    """Schedule depthwise convolutions.

    A task is an output row. It sums a run of neighbouring pixels at a time and normalizes them
    while they are in cache. The input pixels of a run are padded and converted a slice of channels
    at a time, into a buffer that stays in the L1 cache. The window is unrolled, so that each input
    vector is loaded once for all pixels of the run that read it.
    """
    if refusal := refuse_other_kernels(func, "depthwise"):
        return refusal
    dtype = str(func.params[1].dtype)
    lanes = vector_unit(target).lanes(dtype)
    sch = s_tir.Schedule(func)
    epilogue, window = sch.get_sblock("epilogue"), sch.get_sblock("window")
    normalized = len(sch.get_consumers(window)) > 1

    # Step 1. Run output rows in parallel, each in runs of pixels.
    batch, line, pixel, _ = sch.get_loops(epilogue)
    extent = sch.get(pixel).extent
    slack = not structural_equal(extent, sch.get(sch.get_loops(window)[2]).extent)
    pixels = pick_rows(extent, _PIXELS, space, slack=slack)
    run, _ = sch.split(pixel, [None, pixels])
    task = sch.fuse(batch, line)
    sch.parallel(task)

    # Step 2. Normalize a run, or only apply its epilogue.
    if normalized:
        normalize_rows(sch, run, lanes, dtype)
    else:
        vectorize_innermost(sch, epilogue, lanes)

    # Step 3. Sum the window of a run in registers, a few vectors of channels at a time.
    sch.compute_at(window, run, preserve_unit_loops=True)
    sch.set_scope(window, 0, "local")
    *_, tile_pixel, channel, high, wide = sch.get_loops(window)
    channels = static(sch.get(channel).extent)
    widths = [vector_width(channels, vectors * lanes) for vectors in (1, 2, 4)]
    width = space.pick("channels", widths, widths[0])
    size = vector_width(channels, _SLICE_VECTORS * lanes)
    part, channel, vector = sch.split(channel, [None, size // width, width])
    sch.reorder(part, channel, high, wide, tile_pixel, vector)
    sch.unroll(high)
    sch.unroll(wide)
    accumulate_tile(sch, window, [tile_pixel, vector], high)

    # Step 4. Pad the input of a slice; short runs share too much of it with the next one.
    copy_in_task(sch, sch.get_sblock("padded"), part if pixels >= _FEWEST_PIXELS else task, lanes)
    return sch.mod["main"]
