"""GEMM in float32 on GPUs without tensor cores: 16x16 threads, up to 8x8 sums each."""

from __future__ import annotations

import math
from typing import Any, Final

from tvm import s_tir

from dcnv3_tvm.gpu import FULL_GPU_BLOCKS
from dcnv3_tvm.op.expr import static
from dcnv3_tvm.schedules.gpu.loops import divisors, unroll_all, vectorize_copy
from dcnv3_tvm.schedules.gpu.tiles import PAD_BYTES, cache_epilogue_read, copy_vector
from dcnv3_tvm.schedules.space import SearchSpace

_THREADS: Final = 16
"""Rows and columns of threads of a block."""

_MOST: Final = 8
"""Most rows, columns and vectors along the depth of a thread."""

_DYNAMIC_ROWS: Final = 128
"""Rows to choose the sums of a thread by, if their number is dynamic."""

_PIECES: Final = (1, 2, 4, 8)
"""Candidates for the rows, columns and vectors along the depth of a thread."""

_VECTOR: Final = 4
"""Elements of a vector of float32."""


def schedule_by_threads(sch: s_tir.Schedule, space: SearchSpace) -> None:
    """Schedule a GEMM in float32."""
    operand, matmul = sch.get_sblock("operand"), sch.get_sblock("sums")
    epilogue, store = sch.get_sblock("epilogue"), sch.get_sblock("store")
    row, column, depth = sch.get_loops(matmul)

    # Step 1. Choose the sums of a thread and the vectors of a step along the depth.
    rows, columns, deep = (static(sch.get(loop).extent) for loop in (row, column, depth))
    high, wide = _sums(rows, columns or _THREADS)
    steps = max(divisors((deep or 16) // _VECTOR, _MOST))
    high = space.pick("rows", _PIECES, high)
    wide = space.pick("columns", _PIECES, wide)
    steps = space.pick("depth", _PIECES, steps)

    # Step 2. Tile the loops by blocks, threads and steps.
    row, i, rows = sch.split(row, [None, _THREADS, high])
    column, j, columns = sch.split(column, [None, _THREADS, wide])
    step, depth, k = sch.split(depth, [None, steps, _VECTOR])
    sch.reorder(row, column, i, j, step, depth, rows, columns, k)
    block, thread = sch.fuse(row, column), sch.fuse(i, j)
    sch.bind(block, "blockIdx.x")
    sch.bind(thread, "threadIdx.x")

    # Step 3. Accumulate in registers, apply the epilogue and store row by row in vectors.
    sch.set_scope(matmul, 0, "local")
    sch.set_scope(epilogue, 0, "local")
    sch.reverse_compute_at(epilogue, thread, preserve_unit_loops=True)
    one_row = sch.get_loops(epilogue)[-2]
    sch.reverse_compute_at(store, one_row, preserve_unit_loops=True)
    unroll_all(sch, sch.get_loops(epilogue)[-2:])
    copies = [store]
    names = [read.source.name for read in sch.get(epilogue).reads]
    if "residual" in names:
        residual = cache_epilogue_read(sch, epilogue, names.index("residual"))
        sch.compute_at(residual, one_row, preserve_unit_loops=True)
        copies.append(residual)
    whole = math.gcd(wide, int(sch.get(store).writes[0].source.shape[-1]))
    for copy in copies:
        vectorize_copy(sch, copy, whole)

    # Step 4. Load the operands of a thread from shared memory in vectors.
    weight = sch.cache_read(matmul, 1, "shared")
    first, second = sch.cache_read(matmul, 0, "local"), sch.cache_read(matmul, 1, "local")
    for vectors, width in ((first, _VECTOR), (second, wide)):
        sch.compute_at(vectors, depth, preserve_unit_loops=True)
        sch.unroll(sch.get_loops(vectors)[-2])
        vectorize_copy(sch, vectors, width)

    # Step 5. Copy the operands of a step to shared memory, in vectors by all threads. The scope is
    # set first: `compute_at` makes a copy to registers a tile of a thread instead of the block.
    sch.set_scope(operand, 0, "shared")
    for copy in (operand, weight):
        sch.compute_at(copy, step, preserve_unit_loops=True)
        high_loop, wide_loop = sch.get_loops(copy)[-2:]
        wide_loop, lane = sch.split(wide_loop, [None, copy_vector(sch, copy)])
        turn, worker = sch.split(sch.fuse(high_loop, wide_loop), [None, _THREADS * _THREADS])
        sch.bind(worker, "threadIdx.x")
        sch.unroll(turn)
        sch.vectorize(lane)
    sch.storage_align(operand, 0, axis=-2, factor=32, offset=PAD_BYTES // 4)
    if wide == 2 * _VECTOR:
        sch.transform_layout(weight, ("write", 0), _split_vectors)

    # Step 6. Unroll a step and clear the sums before the first one.
    unroll_all(sch, [depth, rows, columns, k])
    clear = sch.decompose_reduction(matmul, step)
    unroll_all(sch, sch.get_loops(clear)[-2:])


def _sums(rows: int | None, columns: int) -> tuple[int, int]:
    """Choose the rows and columns of a thread: the most that leave a block to each multiprocessor.

    Many sums reuse each loaded operand more often.
    """
    heights = divisors((rows or _DYNAMIC_ROWS) // _THREADS, _MOST)
    pieces = [(high, wide) for high in heights for wide in divisors(columns // _THREADS, _MOST)]
    enough = [
        (high, wide)
        for high, wide in pieces
        if rows is None
        or (rows // (high * _THREADS)) * (columns // (wide * _THREADS)) >= FULL_GPU_BLOCKS
    ]
    return max(enough or [(1, 1)], key=lambda piece: (math.prod(piece), min(piece)))


def _split_vectors(depth: Any, column: Any) -> tuple[Any, ...]:
    """Store the first vectors of all threads before their second ones.

    A thread reads eight columns in two vectors; so neighbouring threads read different banks.
    """
    return (
        depth,
        column % (2 * _VECTOR) // _VECTOR,
        column // (2 * _VECTOR),
        column % _VECTOR,
    )
