"""Two products with an activation between them on tensor cores, the hidden columns in registers."""

from __future__ import annotations

from typing import Final

from tvm import s_tir, tirx
from tvm.s_tir.schedule import LoopRV, SBlockRV
from tvm.target import Target

from dcnv3_tvm.dtypes import DTYPE_BYTES
from dcnv3_tvm.gpu import FRAGMENT, HIDDEN_SLAB
from dcnv3_tvm.kernels.mlp import KERNEL
from dcnv3_tvm.op.expr import static
from dcnv3_tvm.schedules.gpu import tensor_core
from dcnv3_tvm.schedules.gpu.launch import set_min_blocks
from dcnv3_tvm.schedules.gpu.loops import divisors, unroll_all
from dcnv3_tvm.schedules.gpu.tensorize import annotate
from dcnv3_tvm.schedules.gpu.tiles import (
    PAD_BYTES,
    by_fragments,
    fetch,
    in_tiles,
    vector_of,
    write_vectors,
)
from dcnv3_tvm.schedules.rule import Refusal, refuse_other_kernels
from dcnv3_tvm.schedules.space import SearchSpace

_ROWS: Final = 128
"""Most rows of a block."""

_WARP_ROWS: Final = 2
"""Fragments of rows of a warp: a weight that it reads is multiplied so often. With twice as many it
would read half of them, but a thread would need all its registers."""

_STAGES: Final = 2
"""Slabs of weights in shared memory: one is multiplied while the other arrives."""

_MIN_BLOCKS: Final = 2
"""Blocks of four warps for which a multiprocessor has registers; of sm_120, ptxas was seen to make
room for four, and to spill."""


def mlp(func: tirx.PrimFunc, target: Target, space: SearchSpace) -> tirx.PrimFunc | Refusal:
    """Schedule the kernels of `dcnv3_tvm.kernels.mlp`.

    A block takes up to 128 rows, which lie in shared memory, and goes through the hidden columns
    slab by slab. Each warp has rows of its own: it sums its part of a slab, applies bias and
    activation in the registers in which the sums lie, which are those in which the tensor cores
    want the factor of the second product, and multiplies. So the warps share nothing but the
    weights, of which the next slab is copied meanwhile.

    Parameters
    ----------
    func : tvm.tirx.PrimFunc
        Any unscheduled function.
    target : tvm.target.Target
        The target.
    space : SearchSpace
        What to decide otherwise than by default.

    Returns
    -------
    tvm.tirx.PrimFunc or Refusal
        The scheduled function; a refusal of other kernels.
    """
    if refusal := refuse_other_kernels(func, KERNEL):
        return refusal
    if (hidden_features := int(func.params[1].shape[0])) % HIDDEN_SLAB:
        return Refusal(f"needs a multiple of {HIDDEN_SLAB} hidden features; got {hidden_features}")
    sch = s_tir.Schedule(func)
    dtype = str(func.params[1].dtype)
    operand, inner, hidden = map(sch.get_sblock, ("operand", "hidden_sums", "hidden"))
    product, epilogue = map(sch.get_sblock, ("sums", "epilogue"))
    row, column, depth = sch.get_loops(product)
    extent = static(sch.get(row).extent) or _ROWS
    high = max(d for d in divisors(extent, _ROWS) if d % FRAGMENT == 0)
    fitting = [tall for tall in (4, _WARP_ROWS, 1) if high % (tall * FRAGMENT) == 0]
    tall = space.pick("rows", fitting, next(tall for tall in fitting if tall <= _WARP_ROWS))
    warps = high // (tall * FRAGMENT)
    slabs = (static(sch.get(depth).extent) or HIDDEN_SLAB) // HIDDEN_SLAB
    stages = min(space.pick("stages", (2, 3), _STAGES), slabs)

    row, warp, rows, i = sch.split(row, [None, warps, tall, FRAGMENT])
    columns, j = sch.split(column, [None, FRAGMENT])
    step, depth, k = sch.split(depth, [None, HIDDEN_SLAB // FRAGMENT, FRAGMENT])
    sch.reorder(row, warp, step, depth, rows, columns, i, j, k)
    sch.bind(row, "blockIdx.x")
    sch.bind(warp, "threadIdx.y")
    sums = sch.cache_write(product, 0, "warp")
    sch.reverse_compute_at(sums, warp, preserve_unit_loops=True)
    sch.reverse_compute_at(epilogue, row, preserve_unit_loops=True)
    sch.set_scope(sums, 0, "shared.dyn")
    weight2, second = _weight(sch, product, depth)
    inner_loops = _slab(sch, inner, hidden, step)
    inner_depth, *_, inner_i = inner_loops
    weight1, first = _weight(sch, inner, inner_depth)
    factor = sch.cache_read(inner, 0, "warp")
    sch.compute_at(factor, inner_depth, preserve_unit_loops=True)
    # In shared memory before it is moved: so it is a tile of the block, not of a warp.
    sch.set_scope(operand, 0, "shared.dyn")
    for copy, loop in ((operand, row), (weight1, step), (weight2, step)):
        sch.compute_at(copy, loop, preserve_unit_loops=True)
        fetch(sch, copy, warps, vector_of(sch, copy))
        sch.storage_align(copy, 0, axis=-2, factor=32, offset=PAD_BYTES // DTYPE_BYTES[dtype])
    write_vectors(sch, epilogue, row, warps)

    # Last: of blocks that are laid out so, TVM does not see that they are computed whole.
    for block in (factor, inner, hidden):
        sch.transform_layout(block, ("write", 0), in_tiles(tensor_core.fragment))
    by_fragments(sch, factor, tensor_core.load(dtype, second=False))
    for block in (first, second):
        sch.transform_layout(block, ("write", 0), in_tiles(tensor_core.transposed_fragment))
        by_fragments(sch, block, tensor_core.load(dtype, second=True))
    sch.transform_layout(sums, ("read", 0), in_tiles(tensor_core.fragment))
    stored = by_fragments(sch, sums, tensor_core.store())
    sch.storage_align(stored, 0, axis=-2, factor=32, offset=8)
    _by_thread(sch, hidden)
    _multiply(sch, inner_loops[:3], inner_i, inner_depth, dtype)
    _multiply(sch, (depth, rows, columns), i, step, dtype)
    if stages > 1:
        # The copies of the weights, first and fifth in a step, before all else; they do not wait.
        last = stages - 1
        sch.annotate(step, "software_pipeline_stage", [0, last, last, last, 0, last])
        sch.annotate(step, "software_pipeline_order", [0, 2, 3, 4, 1, 5])
        sch.annotate(step, "software_pipeline_async_stages", [0])
    return set_min_blocks(sch.mod["main"], target, space, _MIN_BLOCKS)


def _weight(sch: s_tir.Schedule, product: SBlockRV, depth: LoopRV) -> tuple[SBlockRV, SBlockRV]:
    """Let a weight come by way of shared memory; return the blocks that copy it there and on."""
    weight = sch.cache_read(product, 1, "shared.dyn")
    fragments = sch.cache_read(product, 1, "warp")
    sch.compute_at(fragments, depth, preserve_unit_loops=True)
    return weight, fragments


def _slab(
    sch: s_tir.Schedule, inner: SBlockRV, hidden: SBlockRV, step: LoopRV
) -> tuple[LoopRV, LoopRV, LoopRV, LoopRV]:
    """Move the first product into the loop over slabs, and return its loops down to fragments.

    Those of depth, rows and columns, and the first one inside a fragment.
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


def _by_thread(sch: s_tir.Schedule, block: SBlockRV) -> None:
    """Let every thread compute those elements of each fragment that it holds, by their layout.

    The loops over these eight stay loops: unrolled, TVM would not see that an index belongs to the
    thread.
    """
    row, column = sch.get_loops(block)[-2:]
    row, upper, group = sch.split(row, [None, 2, 8])
    column, right, member, odd = sch.split(column, [None, 2, 4, 2])
    sch.reorder(row, column, group, member, right, upper, odd)
    unroll_all(sch, [row, column])
    sch.bind(sch.fuse(group, member), "threadIdx.x")


def _multiply(
    sch: s_tir.Schedule, loops: tuple[LoopRV, ...], i: LoopRV, start: LoopRV, dtype: str
) -> None:
    """Give a product to the tensor cores, its sums cleared in front of the loop `start`."""
    unroll_all(sch, loops)
    multiply = sch.blockize(i)
    clear = sch.decompose_reduction(multiply, start)
    annotate(sch, multiply, tensor_core.multiply(dtype))
    annotate(sch, clear, tensor_core.clear())
    unroll_all(sch, sch.get_loops(clear)[-2:])
