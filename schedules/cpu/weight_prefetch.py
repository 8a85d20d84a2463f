"""Prefetch the next tile of packed weights while a kernel multiplies by the present one."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Final

from tvm import s_tir, tirx
from tvm.s_tir.schedule import LoopRV

from dcnv3_tvm.dtypes import DTYPE_BYTES
from dcnv3_tvm.op.expr import constant_factor, static, unflatten

_LINE: Final = 64
"""Bytes of a cache line of x86-64 CPUs."""

_HINTS: Final = tuple(tirx.const(value, "int32") for value in (0, 2, 1))
"""Arguments of LLVM's prefetch: of data, to be read, into the L2 cache."""

_FEWEST_TURNS: Final = 4
"""Tasks of a weight tile, at least, if their number is dynamic. If there are fewer, they prefetch a
part of the next tile."""


@dataclasses.dataclass(frozen=True)
class WeightUse:
    """Which weight tile a task multiplies by.

    Parameters
    ----------
    tile : expression
        Number of the weight tile.
    turn : expression
        Number of the task among those that multiply by this tile one after another.
    turns : int or expression
        Number of these tasks.
    """

    tile: Any
    turn: Any
    turns: Any


def prefetch_next_tile(
    sch: s_tir.Schedule, weight: tirx.Buffer, use: WeightUse, depth: Sequence[LoopRV]
) -> None:
    """Prefetch the weight tile after that of a task, in loops over input features.

    All tasks of a tile prefetch a part of the next one, so that memory is read at an even rate.
    Hardware prefetchers stop at each page, and weights of a model are in memory, not in a cache.

    Parameters
    ----------
    sch : Schedule
        Schedule to change.
    weight : Buffer
        Packed weights: tiles of consecutive cache lines.
    use : WeightUse
        The task's weight tile.
    depth : sequence of LoopRV
        The loops over input features, nested in this order.
    """
    shape = [int(size) for size in weight.shape]
    if shape[0] == 1:
        return
    item = DTYPE_BYTES[str(weight.dtype)]
    lines = math.prod(shape[1:]) * item // _LINE
    loops = [sch.get(loop) for loop in depth]
    steps = math.prod(int(loop.extent) for loop in loops)
    turns, step = static(use.turns), use.turn
    if turns is None:
        turns = max(constant_factor(use.turns), _FEWEST_TURNS)
        step = tirx.floormod(step, turns)
    for loop in loops:
        step = step * loop.extent + loop.loop_var

    # At least all lines of a tile, in all turns.
    count = -(-lines // (steps * turns))
    shift = max(0, (steps * turns // lines).bit_length() - 1)
    last = shape[0] * lines - 1
    calls = []
    for number in range(count):
        line = (use.tile + 1) * lines + tirx.shift_right(step * count + number, shift)
        place = unflatten(tirx.min(line, last) * (_LINE // item), weight.shape)
        address = tirx.address_of(weight[tuple(place)])
        calls.append(tirx.Evaluate(tirx.call_intrin("void", "tirx.prefetch", address, *_HINTS)))
    reference = sch.get_sref(depth[-1])
    loop = reference.stmt
    body = tirx.SeqStmt([*calls, loop.body])
    ahead = tirx.For(
        loop.loop_var, loop.min, loop.extent, loop.kind, body, loop.thread_binding, loop.annotations
    )
    sch.state.replace(reference, ahead)
