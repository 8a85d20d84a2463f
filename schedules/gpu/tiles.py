"""Steps of the GEMM and MLP rules: tiles in shared memory, tensor-core fragments, epilogue."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Final

from tvm import s_tir
from tvm.s_tir.schedule import LoopRV, SBlockRV

from dcnv3_tvm.dtypes import DTYPE_BYTES
from dcnv3_tvm.gpu import FRAGMENT, WARP_SIZE, vector_elements
from dcnv3_tvm.op.expr import static
from dcnv3_tvm.schedules.gpu import tensor_core
from dcnv3_tvm.schedules.gpu.loops import unroll_all, vectorize_copy
from dcnv3_tvm.schedules.gpu.tensorize import annotate

PAD_BYTES: Final = 16
"""Bytes added to each row in shared memory, so that eight rows are in different banks."""


def copy_vector(sch: s_tir.Schedule, copy: SBlockRV) -> int:
    """Return how many neighbouring elements a copy moves at once; 1 if it converts their type."""
    read = sch.get(copy).reads[0].source
    source, stored = str(read.dtype), str(sch.get(copy).writes[0].source.dtype)
    return vector_elements(static(read.shape[-1]) or 1, source) if source == stored else 1


def copy_tile(sch: s_tir.Schedule, copy: SBlockRV, loop: LoopRV, warps: int) -> None:
    """Copy a tile to shared memory at a loop, in vectors by all threads of a block.

    The tile must be in shared memory already: `compute_at` makes a copy to registers a tile of a
    warp instead of the block.
    """
    sch.compute_at(copy, loop, preserve_unit_loops=True)
    turn, _, lane = _bind_tile(sch, copy, warps, copy_vector(sch, copy))
    sch.unroll(turn)
    sch.vectorize(lane)
    padding = PAD_BYTES // DTYPE_BYTES[str(sch.get(copy).writes[0].source.dtype)]
    sch.storage_align(copy, 0, axis=-2, factor=32, offset=padding)


def _bind_tile(
    sch: s_tir.Schedule, block: SBlockRV, warps: int, vector: int
) -> tuple[LoopRV, LoopRV, LoopRV]:
    """Bind a tile to all threads of a block, and return the loops (turn, thread, vector element).

    Vectors are split off first, so that TVM can tell which elements a thread has.
    """
    row, column = sch.get_loops(block)[-2:]
    column, lane = sch.split(column, [None, vector])
    turn, warp, thread = sch.split(sch.fuse(row, column), [None, warps, WARP_SIZE])
    sch.bind(warp, "threadIdx.y")
    sch.bind(thread, "threadIdx.x")
    return turn, thread, lane


def fragment_layout(
    place: Callable[[Any, Any], tuple[Any, Any]],
) -> Callable[[Any, Any], tuple[Any, ...]]:
    """Return the index map from a matrix to fragments of (thread, register)."""

    def index(i: Any, j: Any) -> tuple[Any, ...]:
        return i // FRAGMENT, j // FRAGMENT, *place(i % FRAGMENT, j % FRAGMENT)

    return index


def load_fragments(sch: s_tir.Schedule, copy: SBlockRV, dtype: str, *, second: bool) -> None:
    """Load fragments of an operand from shared memory; `second` is the right one."""
    place = tensor_core.transposed_fragment if second else tensor_core.fragment
    sch.transform_layout(copy, ("write", 0), fragment_layout(place))
    _by_fragments(sch, copy, tensor_core.load(dtype, second=second))


def store_fragments(sch: s_tir.Schedule, sums: SBlockRV) -> None:
    """Store the fragments of the sums to shared memory."""
    sch.transform_layout(sums, ("read", 0), fragment_layout(tensor_core.fragment))
    stored = _by_fragments(sch, sums, tensor_core.store())
    sch.storage_align(stored, 0, axis=-2, factor=32, offset=8)


def multiply_fragments(
    sch: s_tir.Schedule, loops: Sequence[LoopRV], i: LoopRV, start: LoopRV, dtype: str
) -> None:
    """Multiply fragments on tensor cores, and clear the sums before the loop `start`.

    `loops` iterate over fragments, and `i` is the first loop inside a fragment.
    """
    unroll_all(sch, loops)
    multiply = sch.blockize(i)
    clear = sch.decompose_reduction(multiply, start)
    annotate(sch, multiply, tensor_core.multiply(dtype))
    annotate(sch, clear, tensor_core.clear())
    unroll_all(sch, sch.get_loops(clear)[-2:])


def _by_fragments(sch: s_tir.Schedule, block: SBlockRV, intrinsic: str) -> SBlockRV:
    """Tile a copy by fragments, mark each for an intrinsic, and return the block of a fragment."""
    row, column = sch.get_loops(block)[-2:]
    row, i = sch.split(row, [None, FRAGMENT])
    column, j = sch.split(column, [None, FRAGMENT])
    sch.reorder(row, column, i, j)
    unroll_all(sch, [row, column])
    fragment = sch.blockize(i)
    annotate(sch, fragment, intrinsic)
    return fragment


def store_tile(sch: s_tir.Schedule, epilogue: SBlockRV, block: LoopRV, warps: int) -> None:
    """Apply the epilogue to a tile in shared memory, and store it in vectors by all threads.

    The block that stores is bound to threads and the others follow it: a thread without a part of
    the tile may compute, but must not store.
    """
    store = sch.get_sblock("store")
    columns = static(sch.get(store).writes[0].source.shape[-1]) or 1
    vector = math.gcd(columns, 4)
    sch.set_scope(epilogue, 0, "local")
    sch.reverse_compute_at(store, block, preserve_unit_loops=True)
    _, thread, _ = _bind_tile(sch, store, warps, vector)
    sch.compute_at(epilogue, thread, preserve_unit_loops=True)
    unroll_all(sch, sch.get_loops(epilogue)[-2:])
    copies = [store]
    for index in range(len(sch.get(epilogue).reads)):
        copy = cache_epilogue_read(sch, epilogue, index)
        sch.compute_at(copy, thread, preserve_unit_loops=True)
        copies.append(copy)
    for copy in copies:
        vectorize_copy(sch, copy, vector)


def cache_epilogue_read(sch: s_tir.Schedule, epilogue: SBlockRV, index: int) -> SBlockRV:
    """Copy a tensor that the epilogue reads to registers; the residual as a matrix."""
    if sch.get(epilogue).reads[index].source.name == "residual":
        return sch.reindex_cache_read(epilogue, index, "local", lambda m, n: (m, n))
    return sch.cache_read(epilogue, index, "local")
