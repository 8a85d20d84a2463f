"""LayerNorm over contiguous channels on CPUs: rows in parallel, channels in vectors."""

from __future__ import annotations

from typing import Any, Final

from tvm import s_tir, tirx
from tvm.s_tir.schedule import LoopRV, SBlockRV
from tvm.target import Target
from tvm_ffi import structural_equal

from dcnv3_tvm.op.expr import constant_factor, static
from dcnv3_tvm.schedules.cpu.lane_sum import split_lanes, sum_lanes
from dcnv3_tvm.schedules.cpu.loops import accumulate_tile, vectorize_innermost
from dcnv3_tvm.schedules.cpu.register_tiles import (
    vector_unit,
    whole_tile,
)
from dcnv3_tvm.schedules.rule import Refusal, refuse_other_kernels
from dcnv3_tvm.schedules.space import SearchSpace

_ROWS: Final = 14
"""Most rows normalized together: their sums are independent, which hides latency.

The sums by lane of 14 rows take less than 1 KiB, up to which TVM allocates on the stack: a
workspace costs more than the sums. It does so in the scope global alone.
"""

_MAX_ROWS: Final = 16
"""Most rows that the search space offers."""


def layer_norm(func: tirx.PrimFunc, target: Target, space: SearchSpace) -> tirx.PrimFunc | Refusal:
    """Schedule LayerNorm over contiguous channels.

    A task normalizes a few rows together. Channels are summed in vectors, then over the lanes of a
    vector by shuffles.
    """
    if refusal := refuse_other_kernels(func, "layer_norm"):
        return refusal
    dtype = str(func.params[0].dtype)
    lanes = vector_unit(target).lanes(dtype)
    sch = s_tir.Schedule(func)
    epilogue = sch.get_sblock("epilogue")
    row, _ = sch.get_loops(epilogue)
    extent = sch.get(row).extent
    summed = sch.get(sch.get_loops(sch.get_sblock("total"))[0]).extent
    slack = not structural_equal(extent, summed)
    task, _ = sch.split(row, [None, pick_rows(extent, _ROWS, space, slack=slack)])
    sch.parallel(task)
    normalize_rows(sch, task, lanes, dtype)
    return sch.mod["main"]


def pick_rows(rows: Any, most: int, space: SearchSpace, *, slack: bool = False) -> int:
    """Decide how many rows to compute together: a divisor of `rows` up to `most`, or one.

    With `slack`, the sums of rows beyond the last are computed: any number will do.
    """
    if slack:
        return space.pick("rows", range(1, _MAX_ROWS + 1), most)
    known = static(rows)
    default = whole_tile(known if known is not None else constant_factor(rows), most) or 1
    divisors = [size for size in range(1, _MAX_ROWS + 1) if (known or 0) % size == 0]
    return space.pick("rows", divisors if known is not None else [], default)


def normalize_rows(sch: s_tir.Schedule, task: LoopRV, lanes: int, dtype: str) -> None:
    """Compute the blocks of a LayerNorm at a loop.

    Parameters
    ----------
    sch : Schedule
        Schedule to change.
    task : LoopRV
        Loop to compute at; block ``epilogue`` has one loop over rows and one over channels in it.
    lanes : int
        Elements of a vector register.
    dtype : str
        Element type of the computation.
    """
    scale = sch.get_sblock("scale")
    sch.compute_at(scale, task, preserve_unit_loops=True)
    for name in ("square", "total"):
        sum_channels(sch, sch.get_sblock(name), task, lanes, dtype)
    epilogue = sch.get_sblock("epilogue")
    vectorize_innermost(sch, epilogue, lanes)


def sum_channels(
    sch: s_tir.Schedule, total: SBlockRV, task: LoopRV, lanes: int, dtype: str
) -> None:
    """Sum over channels in vectors, then over the lanes of a vector.

    Parameters
    ----------
    sch : Schedule
        Schedule to change.
    total : SBlockRV
        Block that sums over its innermost loop, the channels.
    task : LoopRV
        Loop to compute the sum at; the rows that are summed together are inside it.
    lanes : int
        Elements of a vector register.
    dtype : str
        Element type of the sums.
    """
    partial = split_lanes(sch, total, lanes)
    for stage in [total] if partial is None else [total, partial]:
        sch.compute_at(stage, task, preserve_unit_loops=True)
    if partial is not None:
        *_, row, lane, step = sch.get_loops(partial)
        sch.reorder(step, row, lane)
        accumulate_tile(sch, partial, [row, lane], step)
        sum_lanes(sch, total, sch.get_loops(total)[-2], task, dtype)
