"""Tiles of matrices in shared memory and on tensor cores: steps that rules for products share."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Final

from tvm import s_tir
from tvm.s_tir.schedule import LoopRV, SBlockRV

from dcnv3_tvm.gpu import FRAGMENT, WARP_SIZE, vector_elements
from dcnv3_tvm.op.expr import static
from dcnv3_tvm.schedules.gpu.loops import unroll_all, vectorize_copy
from dcnv3_tvm.schedules.gpu.tensorize import annotate

PAD_BYTES: Final = 16
"""Added to every row in shared memory, so that eight rows lie in different banks."""


def in_tiles(
    place: Callable[[Any, Any], tuple[Any, Any]],
) -> Callable[[Any, Any], tuple[Any, ...]]:
    """Turn the place of an element in a 16x16 tile into one in a matrix of such tiles."""

    def index(i: Any, j: Any) -> tuple[Any, ...]:
        return i // FRAGMENT, j // FRAGMENT, *place(i % FRAGMENT, j % FRAGMENT)

    return index


def by_fragments(sch: s_tir.Schedule, block: SBlockRV, intrinsic: str) -> SBlockRV:
    """Let a block move whole fragments, by an intrinsic, and return the block of a fragment."""
    row, column = sch.get_loops(block)[-2:]
    row, i = sch.split(row, [None, FRAGMENT])
    column, j = sch.split(column, [None, FRAGMENT])
    sch.reorder(row, column, i, j)
    unroll_all(sch, [row, column])
    fragment = sch.blockize(i)
    annotate(sch, fragment, intrinsic)
    return fragment


def fetch(sch: s_tir.Schedule, copy: SBlockRV, warps: int, vector: int) -> None:
    """Let all threads of a block copy a tile, in vectors."""
    turn, _, lane = _share(sch, copy, warps, vector)
    sch.unroll(turn)
    sch.vectorize(lane)


def _share(
    sch: s_tir.Schedule, block: SBlockRV, warps: int, vector: int
) -> tuple[LoopRV, LoopRV, LoopRV]:
    """Share out a tile among all threads of a block, and return the loops of turns, threads, lanes.

    Lanes are split off first, so that TVM sees which elements a thread has.
    """
    row, column = sch.get_loops(block)[-2:]
    column, lane = sch.split(column, [None, vector])
    turn, warp, thread = sch.split(sch.fuse(row, column), [None, warps, WARP_SIZE])
    sch.bind(warp, "threadIdx.y")
    sch.bind(thread, "threadIdx.x")
    return turn, thread, lane


def vector_of(sch: s_tir.Schedule, copy: SBlockRV) -> int:
    """Return how many neighbouring elements one copy can take: they must be so in the source."""
    read = sch.get(copy).reads[0].source
    source, stored = str(read.dtype), str(sch.get(copy).writes[0].source.dtype)
    if source != stored:
        return 1
    return vector_elements(static(read.shape[-1]) or 1, source)


def write_vectors(sch: s_tir.Schedule, epilogue: SBlockRV, block: LoopRV, warps: int) -> None:
    """Let all threads of a block finish a tile that lies in shared memory, in vectors.

    What is stored is shared out, and the rest follows it: a thread that has no part of the tile
    may compute something, but must not store it.
    """
    store = sch.get_sblock("store")
    columns = static(sch.get(store).writes[0].source.shape[-1]) or 1
    vector = math.gcd(columns, 4)
    sch.set_scope(epilogue, 0, "local")
    sch.reverse_compute_at(store, block, preserve_unit_loops=True)
    _, thread, _ = _share(sch, store, warps, vector)
    sch.compute_at(epilogue, thread, preserve_unit_loops=True)
    unroll_all(sch, sch.get_loops(epilogue)[-2:])
    copies = [store]
    for index in range(len(sch.get(epilogue).reads)):
        copy = read_early(sch, epilogue, index)
        sch.compute_at(copy, thread, preserve_unit_loops=True)
        copies.append(copy)
    for copy in copies:
        vectorize_copy(sch, copy, vector)


def read_early(sch: s_tir.Schedule, epilogue: SBlockRV, index: int) -> SBlockRV:
    """Let a tensor that the epilogue reads be copied to registers first, by row and column."""
    if sch.get(epilogue).reads[index].source.name == "residual":
        return sch.reindex_cache_read(epilogue, index, "local", lambda m, n: (m, n))
    return sch.cache_read(epilogue, index, "local")
