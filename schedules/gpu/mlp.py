"""Fused MLP on tensor cores: two matmuls and an activation, hidden features in registers."""

from __future__ import annotations

from typing import Final

from tvm import s_tir, tirx
from tvm.s_tir.schedule import LoopRV, SBlockRV
from tvm.target import Target

from dcnv3_tvm.gpu import FRAGMENT, HIDDEN_SLAB
from dcnv3_tvm.kernels.mlp import KERNEL
from dcnv3_tvm.op.expr import static
from dcnv3_tvm.schedules.gpu import tensor_core
from dcnv3_tvm.schedules.gpu.launch import set_min_blocks
from dcnv3_tvm.schedules.gpu.loops import divisors, unroll_all
from dcnv3_tvm.schedules.gpu.tiles import (
    copy_tile,
    fragment_layout,
    load_fragments,
    multiply_fragments,
    store_fragments,
    store_tile,
)
from dcnv3_tvm.schedules.rule import Refusal, refuse_other_kernels
from dcnv3_tvm.schedules.space import SearchSpace

_ROWS: Final = 128
"""Most rows of a block."""

_WARP_ROWS: Final = 2
"""Fragments of rows of a warp, which reuse each weight fragment. Twice as many would halve the
reads of weights, but need all registers of a thread."""

_STAGES: Final = 2
"""Slabs of weights in shared memory: one is multiplied while the other is copied."""

_MIN_BLOCKS: Final = 2
"""Blocks of four warps whose registers fit a multiprocessor. For sm_120 ptxas chooses four without
this bound, and spills."""


def mlp(func: tirx.PrimFunc, target: Target, space: SearchSpace) -> tirx.PrimFunc | Refusal:
    """Schedule the kernels of `dcnv3_tvm.kernels.mlp`.

    A block keeps up to 128 rows of the input in shared memory and iterates over slabs of hidden
    features. Each warp has rows of its own: it computes its part of a slab, applies bias and
    activation in registers, whose layout is that of an operand of the second matmul, and multiplies
    again. Warps share only the weights; the next slab of them is copied asynchronously.
    """
    if refusal := refuse_other_kernels(func, KERNEL):
        return refusal
    if (hidden_features := int(func.params[1].shape[0])) % HIDDEN_SLAB:
        return Refusal(f"needs a multiple of {HIDDEN_SLAB} hidden features; got {hidden_features}")
    sch = s_tir.Schedule(func)
    dtype = str(func.params[1].dtype)
    operand, inner, hidden = map(sch.get_sblock, ("operand", "hidden_sums", "hidden"))
    outer, epilogue = map(sch.get_sblock, ("sums", "epilogue"))
    row, column, depth = sch.get_loops(outer)

    # Step 1. Choose the rows of a block and a warp, and the stages of the pipeline.
    extent = static(sch.get(row).extent) or _ROWS
    high = max(d for d in divisors(extent, _ROWS) if d % FRAGMENT == 0)
    fitting = [tall for tall in (4, _WARP_ROWS, 1) if high % (tall * FRAGMENT) == 0]
    tall = space.pick("rows", fitting, next(tall for tall in fitting if tall <= _WARP_ROWS))
    warps = high // (tall * FRAGMENT)
    slabs = (static(sch.get(depth).extent) or HIDDEN_SLAB) // HIDDEN_SLAB
    stages = min(space.pick("stages", (2, 3), _STAGES), slabs)

    # Step 2. Tile the second matmul by blocks, warps, slabs and fragments.
    row, warp, rows, i = sch.split(row, [None, warps, tall, FRAGMENT])
    columns, j = sch.split(column, [None, FRAGMENT])
    step, depth, k = sch.split(depth, [None, HIDDEN_SLAB // FRAGMENT, FRAGMENT])
    sch.reorder(row, warp, step, depth, rows, columns, i, j, k)
    sch.bind(row, "blockIdx.x")
    sch.bind(warp, "threadIdx.y")

    # Step 3. Accumulate in registers, and pass the sums to the epilogue through shared memory.
    sums = sch.cache_write(outer, 0, "warp")
    sch.reverse_compute_at(sums, warp, preserve_unit_loops=True)
    sch.reverse_compute_at(epilogue, row, preserve_unit_loops=True)
    sch.set_scope(sums, 0, "shared.dyn")
    weight2, second = _cache_weight(sch, outer, depth)

    # Step 4. Compute the first matmul of a slab in the loop over slabs.
    inner_loops = _tile_inner(sch, inner, hidden, step)
    inner_depth, *_, inner_i = inner_loops
    weight1, first = _cache_weight(sch, inner, inner_depth)
    rows_operand = sch.cache_read(inner, 0, "warp")
    sch.compute_at(rows_operand, inner_depth, preserve_unit_loops=True)

    # Step 5. Copy the rows of a block and the weights of a slab to shared memory.
    sch.set_scope(operand, 0, "shared.dyn")
    for copy, loop in ((operand, row), (weight1, step), (weight2, step)):
        copy_tile(sch, copy, loop, warps)

    # Step 6. Apply the epilogue and store in vectors.
    store_tile(sch, epilogue, row, warps)

    # Step 7. Load, multiply and store fragments by tensor intrinsics. Layouts are changed last.
    # See tvm_workarounds: transformed-layout.
    for block in (inner, hidden):
        sch.transform_layout(block, ("write", 0), fragment_layout(tensor_core.fragment))
    load_fragments(sch, rows_operand, dtype, second=False)
    load_fragments(sch, first, dtype, second=True)
    load_fragments(sch, second, dtype, second=True)
    store_fragments(sch, sums)
    _bind_fragment(sch, hidden)
    multiply_fragments(sch, inner_loops[:3], inner_i, inner_depth, dtype)
    multiply_fragments(sch, (depth, rows, columns), i, step, dtype)

    # Step 8. Pipeline: copy the weights of later slabs, the first and fifth statement of a step,
    # asynchronously before everything else.
    if stages > 1:
        last = stages - 1
        sch.annotate(step, "software_pipeline_stage", [0, last, last, last, 0, last])
        sch.annotate(step, "software_pipeline_order", [0, 2, 3, 4, 1, 5])
        sch.annotate(step, "software_pipeline_async_stages", [0])
    return set_min_blocks(sch.mod["main"], target, space, _MIN_BLOCKS)


def _cache_weight(
    sch: s_tir.Schedule, matmul: SBlockRV, depth: LoopRV
) -> tuple[SBlockRV, SBlockRV]:
    """Return the copies of a weight to shared memory and to fragments, the latter at `depth`."""
    weight = sch.cache_read(matmul, 1, "shared.dyn")
    fragments = sch.cache_read(matmul, 1, "warp")
    sch.compute_at(fragments, depth, preserve_unit_loops=True)
    return weight, fragments


def _tile_inner(
    sch: s_tir.Schedule, inner: SBlockRV, hidden: SBlockRV, step: LoopRV
) -> tuple[LoopRV, LoopRV, LoopRV, LoopRV]:
    """Compute the first matmul at `step` and tile it by fragments.

    Returns the loops (depth, row, column) over fragments, and the first loop inside a fragment.
    """
    for block in (hidden, inner):
        sch.set_scope(block, 0, "warp")
        sch.compute_at(block, step, preserve_unit_loops=True)
    row, column, depth = sch.get_loops(inner)[-3:]
    row, i = sch.split(row, [None, FRAGMENT])
    column, j = sch.split(column, [None, FRAGMENT])
    depth, k = sch.split(depth, [None, FRAGMENT])
    sch.reorder(depth, row, column, i, j, k)
    return depth, row, column, i


def _bind_fragment(sch: s_tir.Schedule, block: SBlockRV) -> None:
    """Bind each fragment of an elementwise block to threads by its layout.

    The loops over a thread's eight elements are not unrolled. See tvm_workarounds:
    lower-warp-memory.
    """
    row, column = sch.get_loops(block)[-2:]
    row, upper, group = sch.split(row, [None, 2, 8])
    column, right, member, odd = sch.split(column, [None, 2, 4, 2])
    sch.reorder(row, column, group, member, right, upper, odd)
    unroll_all(sch, [row, column])
    sch.bind(sch.fuse(group, member), "threadIdx.x")
