"""DCNv3 on GPUs: threads load vectors of channels and accumulate them in registers."""

from __future__ import annotations

from typing import Final

from tvm import s_tir, tirx
from tvm.s_tir.schedule import LoopRV, SBlockRV
from tvm.target import Target

from dcnv3_tvm.gpu import vector_elements
from dcnv3_tvm.op.expr import static
from dcnv3_tvm.op.tensorir import spec_of
from dcnv3_tvm.schedules.blocks import block_names
from dcnv3_tvm.schedules.gpu.dcnv3_tile import BlockTile, OutputSize, choose_tile
from dcnv3_tvm.schedules.gpu.launch import set_min_blocks
from dcnv3_tvm.schedules.gpu.loops import bind_blocks, unroll_all, vectorize_copy
from dcnv3_tvm.schedules.rule import Refusal, refuse_other_kernels
from dcnv3_tvm.schedules.space import SearchSpace

_KERNELS: Final = ("dcnv3", "dcnv3_packed")

_MAX_UNROLLED_POINTS: Final = 16
"""Most points over which the loop is unrolled."""

# Blocks computed for each point, and for each group of an output, with the number of their loops
# inside those over outputs. Consumers come before producers, the order that compute_at needs.
_POINT_BLOCKS: Final = {"pixels": 1, "weights": 3, "corners": 1, "coordinates": 1}
_GROUP_BLOCKS: Final = {"gate": 0, "softmax_sum": 1, "softmax_exp": 1, "softmax_max": 1}


def dcnv3(func: tirx.PrimFunc, target: Target, space: SearchSpace) -> tirx.PrimFunc | Refusal:
    """Schedule the vector-load variant of the kernels of `dcnv3_tvm.op.tensorir`.

    A block computes a run of pixels for some of the groups; a thread, one or two vectors of the
    channels of a group at one pixel. Point by point, a thread computes coordinates and weights,
    loads the four pixels in vectors and adds them to its sums. Only the sums and the softmax
    outlive a point, so registers suffice for many threads, whose loads overlap.

    The kernel is bound by instructions: a conversion and a multiply-add for each channel and
    corner, and the coordinates, which should therefore serve at least 16 channels. One thread for
    two vectors would use only half of each 32-byte sector that a load touches, and the L1 cache
    would be the bound. Instead, the threads of a group can share sampling points: each accumulates
    one vector at several adjacent outputs, computes coordinates, weights and softmax of one of
    these outputs, and gets those of the others by warp shuffles.
    """
    if refusal := refuse_other_kernels(func, *_KERNELS):
        return refusal
    sch = s_tir.Schedule(func)
    names = block_names(sch)
    if "patch" not in names:
        return Refusal("needs the kernel variant with vector loads; this is the one for CPUs")

    # Step 1. Cache the output in registers, before tiling. See tvm_workarounds: cache-write-bounds.
    store = sch.get_sblock("store")
    out_local = sch.cache_write(store, 0, "local")

    # Step 2. Choose the tile, and bind outputs to blocks and threads.
    spec = spec_of(func)
    vector = vector_elements(spec.group_channels, spec.dtype)
    size = OutputSize(*(static(sch.get(loop).extent) for loop in sch.get_loops(store)[:3]))
    tile = choose_tile(spec, size, space)
    thread, output = _bind_outputs(sch, store, tile, vector)
    sch.reverse_compute_at(out_local, output, preserve_unit_loops=True)
    vectorize_copy(sch, out_local, vector)

    # Step 3. Accumulate the outputs of a thread in registers, point by point.
    total = sch.get_sblock("sum")
    sch.compute_at(total, thread, preserve_unit_loops=True)
    sch.set_scope(total, 0, "local")
    *_, pixel, group, point, row, column, channel = sch.get_loops(total)
    sch.reorder(point, pixel, group)
    unroll_all(sch, [pixel, group, row, column, channel])

    # Step 4. Load the pixels of a point, and compute its coordinates and weights.
    sharing = tile.work.sharing_threads
    patch, coordinates = sch.get_sblock("patch"), sch.get_sblock("coordinates")
    offset_local = sch.cache_read(coordinates, 0, "local", [coordinates])
    _compute_at(sch, patch, group, 3)
    for name, inner in _POINT_BLOCKS.items():
        shared_output = _compute_at(sch, sch.get_sblock(name), point, inner, sharing)
    # The two offsets of a point are adjacent, and so aligned for one load.
    sch.compute_at(offset_local, shared_output, preserve_unit_loops=True)
    sch.vectorize(sch.get_loops(offset_local)[-1])

    # Step 5. Compute softmax and gate once per group.
    for name, inner in _GROUP_BLOCKS.items():
        if name in names:
            _compute_at(sch, sch.get_sblock(name), thread, inner, sharing)

    # Step 6. Unroll points, initialize sums ahead of their loops, and vectorize the loads.
    if spec.points <= _MAX_UNROLLED_POINTS:
        sch.unroll(point)
    init = sch.decompose_reduction(total, point)
    unroll_all(sch, sch.get_loops(init)[-3:])
    for name in ("softmax_sum", "softmax_max"):
        if name in names:
            block = sch.get_sblock(name)
            sch.decompose_reduction(block, sch.get_loops(block)[-1])
    vectorize_copy(sch, patch, vector)
    if "center" in names:
        center = sch.get_sblock("center")
        _compute_at(sch, center, thread, 1)
        vectorize_copy(sch, center, vector)
    return set_min_blocks(sch.mod["main"], target, space)


def _bind_outputs(
    sch: s_tir.Schedule, store: SBlockRV, tile: BlockTile, vector: int
) -> tuple[LoopRV, LoopRV]:
    """Bind the loops over outputs to blocks and threads.

    Returns the innermost loop of threads, and the innermost loop over the outputs of a thread.
    """
    work = tile.work
    batch, row, column, group, channel = sch.get_loops(store)
    image_is_static = all(static(sch.get(loop).extent) is not None for loop in (row, column))

    # Split into block, thread and the work of a thread.
    lane, *vectors = sch.split(channel, [None, work.vectors, vector])
    slab, group, own_groups = sch.split(group, [None, tile.groups // work.groups, work.groups])
    column, own_columns = sch.split(column, [None, work.columns])
    if image_is_static:
        place, pixel = sch.split(sch.fuse(row, column), [None, tile.pixels // work.columns])
        outer, inner = [batch], [slab, place]
    else:  # pixels of one row, so that no thread divides by a dynamic extent
        place, pixel = sch.split(column, [None, tile.pixels])
        outer, inner = [batch, row], [place, slab]
    own = [own_columns, own_groups, *vectors]
    sch.reorder(*outer, *inner, pixel, group, lane, *own)

    unroll_all(sch, own)
    bind_blocks(sch, outer, inner)
    if work.sharing_threads > 1:
        sch.bind(sch.fuse(pixel, group), "threadIdx.y")
    else:
        lane = sch.fuse(pixel, group, lane)
    sch.bind(lane, "threadIdx.x")
    return lane, own_groups


def _compute_at(
    sch: s_tir.Schedule, block: SBlockRV, loop: LoopRV, inner: int, sharing: int = 1
) -> LoopRV:
    """Compute a block in registers, its `inner` innermost loops unrolled.

    Threads that share points compute one output each; TVM lowers the scope "warp" to shuffles.
    Returns the loop over outputs.
    """
    for index in range(len(sch.get(block).writes)):
        sch.set_scope(block, index, "warp" if sharing > 1 else "local")
    sch.compute_at(block, loop, preserve_unit_loops=True)
    *_, columns, groups = sch.get_loops(block)[: -inner or None]
    unroll_all(sch, sch.get_loops(block)[-inner:] if inner else [])
    outputs = sch.fuse(columns, groups)
    if sharing > 1:
        sch.bind(outputs, "threadIdx.x")
    else:
        sch.unroll(outputs)
    return outputs
