"""Schedule of depthwise convolutions, with or without LayerNorm behind them."""

from __future__ import annotations

from tvm import s_tir, tirx
from tvm.target import Target

from dcnv3_tvm.op.expr import static
from dcnv3_tvm.schedules.cpu.layer_norm import normalize, rows_at_once
from dcnv3_tvm.schedules.cpu.register_tiles import (
    copy_in_task,
    unroll_tile,
    vector_unit,
    vector_width,
    vectorize_innermost,
)
from dcnv3_tvm.schedules.rule import Refusal, refuse_other_kernels
from dcnv3_tvm.schedules.space import SearchSpace


def depthwise(func: tirx.PrimFunc, target: Target, space: SearchSpace) -> tirx.PrimFunc | Refusal:
    """Sum a run of neighbouring pixels at a time, and normalise them while they are in cache.

    A task is an output row; it copies the input rows it needs into their frame of zeros. The
    window is unrolled, so that an input vector is loaded once for all the pixels that see it.
    """
    if refusal := refuse_other_kernels(func, "depthwise"):
        return refusal
    dtype = str(func.params[1].dtype)
    lanes = vector_unit(target).lanes(dtype)
    sch = s_tir.Schedule(func)
    epilogue, window = sch.get_sblock("epilogue"), sch.get_sblock("window")
    normalized = len(sch.get_consumers(window)) > 1
    batch, line, pixel, _ = sch.get_loops(epilogue)
    run, _ = sch.split(pixel, [None, rows_at_once(sch.get(pixel).extent, space)])
    task = sch.fuse(batch, line)
    sch.parallel(task)
    if normalized:
        normalize(sch, run, lanes, dtype)
    else:
        vectorize_innermost(sch, epilogue, lanes)

    sch.compute_at(window, run, preserve_unit_loops=True)
    sch.set_scope(window, 0, "local")
    *_, tile_pixel, channel, high, wide = sch.get_loops(window)
    channels = static(sch.get(channel).extent)
    widths = [vector_width(channels, vectors * lanes) for vectors in (1, 2, 4)]
    width = space.pick("channels", widths, widths[0])
    channel, vector = sch.split(channel, [None, width])
    sch.reorder(channel, high, wide, tile_pixel, vector)
    sch.unroll(high)
    sch.unroll(wide)
    unroll_tile(sch, window, [tile_pixel, vector], high)
    copy_in_task(sch, sch.get_sblock("padded"), task, lanes)
    return sch.mod["main"]
