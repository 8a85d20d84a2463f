"""What the GPU rules share: short scheduling steps."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Final

import tvm_ffi
from tvm import s_tir, tirx
from tvm.s_tir.schedule import LoopRV, SBlockRV

from dcnv3_tvm import gpu
from dcnv3_tvm.op.expr import static
from dcnv3_tvm.schedules.space import DecisionError

VECTOR_BYTES: Final = gpu.ALIGNMENT
"""The widest access of a thread to memory."""


def launches(func: tirx.PrimFunc) -> list[dict[str, str]]:
    """Return how the kernels of a scheduled function are started: extents by thread axis."""
    kernels: list[dict[str, str]] = []

    def visit(loop: tirx.For) -> None:
        if loop.thread_binding is None:
            return
        axis = str(loop.thread_binding.thread_tag)
        if not kernels or axis == "blockIdx.x":
            kernels.append({})
        kernels[-1].setdefault(axis, re.sub(r"T\.int64\((-?\d+)\)", r"\1", str(loop.extent)))

    tvm_ffi.structural_walk(func.body, (tirx.For, visit), order="pre")
    return kernels


def block_threads(extents: Mapping[str, str]) -> int:
    """Count the threads of a block, of one of `launches`."""
    return math.prod(
        int(extent)
        for axis, extent in extents.items()
        if axis.startswith("threadIdx") and extent.isdecimal()
    )


def check_launch(func: tirx.PrimFunc) -> None:
    """Refuse a scheduled function whose blocks ask for more threads than a GPU gives them.

    Raises
    ------
    DecisionError
        If it does.
    """
    for extents in launches(func):
        threads = block_threads(extents)
        if threads > gpu.BLOCK_THREADS:
            raise DecisionError(
                "a block has too many threads", got=threads, allowed=f"up to {gpu.BLOCK_THREADS}"
            )


def divisors(number: int, largest: int | None = None) -> list[int]:
    """List the divisors of a number, up to `largest`."""
    limit = number if largest is None else min(number, largest)
    return [d for d in range(1, limit + 1) if number % d == 0]


def bind_blocks(sch: s_tir.Schedule, outer: Sequence[LoopRV], inner: Sequence[LoopRV]) -> None:
    """Bind loops, which follow each other, to the blocks of a kernel.

    All to one axis, where no extent but the first is open: by the first nothing is divided. Where
    others are, to find its place a block divides by them: less often if the inner loops have an
    axis of their own (of which CUDA allows 65535).
    """
    known = all(static(sch.get(loop).extent) is not None for loop in (*outer[1:], *inner))
    axes = [[*outer, *inner]] if known else [outer, inner]
    for loops, axis in zip(axes, ("blockIdx.x", "blockIdx.y"), strict=False):
        sch.bind(sch.fuse(*loops), axis)


def unroll_all(sch: s_tir.Schedule, loops: Sequence[LoopRV]) -> None:
    """Unroll loops."""
    for loop in loops:
        sch.unroll(loop)


def vectorize_copy(sch: s_tir.Schedule, block: SBlockRV, width: int) -> None:
    """Split the innermost loop of a block into unrolled vectors of `width` elements."""
    outer, lane = sch.split(sch.get_loops(block)[-1], [None, width])
    sch.unroll(outer)
    sch.vectorize(lane)
