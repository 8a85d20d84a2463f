"""What the GPU rules share: choices that a tuner can change, and short scheduling steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from tvm import s_tir
from tvm.s_tir.schedule import ExprRV, LoopRV, SBlockRV

VECTOR_BYTES: Final = 16
"""The widest access of a thread to memory."""


def choose(sch: s_tir.Schedule, candidates: Sequence[int], default: int) -> ExprRV:
    """Make a decision that is recorded in the schedule's trace, so that a tuner can change it.

    Parameters
    ----------
    sch : Schedule
        The schedule.
    candidates : sequence of int
        What it may be, without repetition.
    default : int
        One of them, which is taken.
    """
    ordered = sorted(candidates)
    probability = 1.0 / len(ordered)
    return sch.sample_categorical(
        ordered, [probability] * len(ordered), decision=ordered.index(default)
    )


def divisors(number: int, largest: int | None = None) -> list[int]:
    """List the divisors of a number, up to `largest`."""
    limit = number if largest is None else min(number, largest)
    return [d for d in range(1, limit + 1) if number % d == 0]


def unroll_all(sch: s_tir.Schedule, loops: Sequence[LoopRV]) -> None:
    """Unroll loops."""
    for loop in loops:
        sch.unroll(loop)


def vectorize_copy(sch: s_tir.Schedule, block: SBlockRV, width: int) -> None:
    """Split the innermost loop of a block into unrolled vectors of `width` elements."""
    outer, lane = sch.split(sch.get_loops(block)[-1], [None, width])
    sch.unroll(outer)
    sch.vectorize(lane)
