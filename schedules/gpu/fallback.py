"""Stock TVM operators on GPUs, and every other kernel without a rule of its own."""

from __future__ import annotations

import contextlib

from tvm import s_tir, tirx
from tvm.s_tir.schedule import SBlockRV, ScheduleError
from tvm.target import Target

from dcnv3_tvm.schedules.blocks import plain_axes, reduces
from dcnv3_tvm.schedules.gpu.elementwise import bind_elements, elementwise
from dcnv3_tvm.schedules.gpu.reduction import reduction
from dcnv3_tvm.schedules.rule import Refusal
from dcnv3_tvm.schedules.space import SearchSpace


def fallback(func: tirx.PrimFunc, target: Target, space: SearchSpace) -> tirx.PrimFunc | Refusal:
    """Schedule any kernel.

    Elementwise blocks are inlined. The function becomes one GPU kernel, or one for each block if
    that fails. A block that cannot be parallelized runs in a single thread.
    """
    del target, space  # The rule makes no decisions.
    with contextlib.suppress(ScheduleError):
        sch = s_tir.Schedule(func)
        _inline_elementwise(sch)
        if _fuse_into_one_kernel(sch):
            return sch.mod["main"]
    sch = s_tir.Schedule(func)
    _inline_elementwise(sch)
    _bind_each_block(sch)
    return sch.mod["main"]


def _inline_elementwise(sch: s_tir.Schedule) -> None:
    for block in _blocks(sch):
        if not reduces(sch, block):
            with contextlib.suppress(ScheduleError):
                sch.compute_inline(block)


def _blocks(sch: s_tir.Schedule) -> list[SBlockRV]:
    return list(sch.get_child_blocks(sch.get_sblock("root")))


def _fuse_into_one_kernel(sch: s_tir.Schedule) -> bool:
    """Schedule one elementwise block, or reductions followed by at most one elementwise block."""
    blocks = _blocks(sch)
    results = [block for block in blocks if not sch.get_consumers(block)]
    if len(results) != 1 or any(plain_axes(sch, block) is None for block in blocks):
        return False
    result = results[0]
    if len(blocks) == 1 and not reduces(sch, result):
        elementwise(sch, result)
        return True
    if reduces(sch, result):
        # Accumulate in a register, not in global memory.
        result = sch.cache_write(result, 0, "local")
    else:
        blocks.remove(result)
    return all(reduces(sch, block) for block in blocks) and reduction(sch, blocks, result)


def _bind_each_block(sch: s_tir.Schedule) -> None:
    """Make each block a kernel: one element a thread, or all of it in one thread."""
    for block in _blocks(sch):
        axes = plain_axes(sch, block)
        if axes is not None:
            with contextlib.suppress(ScheduleError):
                spatial, steps = axes
                sch.reorder(*spatial, *steps)
                bind_elements(sch, sch.fuse(*spatial))
                continue
        loops = sch.get_loops(block)
        if not loops or sch.get(loops[0]).thread_binding is None:
            sch.bind(sch.add_unit_loop(loops[0] if loops else block), "threadIdx.x")
