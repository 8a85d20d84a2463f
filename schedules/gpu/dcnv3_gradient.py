"""Gradients of DCNv3 on GPUs: one thread for the points of a group at an output pixel."""

from __future__ import annotations

from collections.abc import Container, Sequence
from typing import Final

from tvm import s_tir, tirx
from tvm.s_tir.schedule import LoopRV, SBlockRV
from tvm.target import Target

from dcnv3_tvm import gpu
from dcnv3_tvm.gpu import MAX_BLOCK_THREADS, vector_elements
from dcnv3_tvm.op.expr import static
from dcnv3_tvm.op.tensorir import spec_of
from dcnv3_tvm.schedules.blocks import block_names, reduces
from dcnv3_tvm.schedules.gpu.dcnv3_tile import SHUFFLE_WIDTHS, ThreadWork
from dcnv3_tvm.schedules.gpu.launch import set_min_blocks
from dcnv3_tvm.schedules.gpu.loops import bind_blocks, divisors, unroll_all, vectorize_copy
from dcnv3_tvm.schedules.rule import Refusal, refuse_other_kernels
from dcnv3_tvm.schedules.space import DecisionError, SearchSpace
from dcnv3_tvm.spec import DCNv3Spec

_THREADS: Final = 128
"""Default number of threads of a block."""

_ZERO_THREADS: Final = 256
"""Threads of a block of the kernel that sets the gradient of x to zero."""

_PIXELS: Final = (1, 2, 4, 8, 16, 32, 64, 128)
"""Candidates for the pixels of a block, besides the divisors of a row and whole rows."""

_DYNAMIC_IMAGES: Final = 32
"""Assumed images of a dynamic batch, in training."""

_MAX_UNROLLED_POINTS: Final = 16
"""Most points over which loops are unrolled, and whose gradients are kept on the chip."""

_MAX_CHANNELS: Final = 32
"""Most channels of a group that a thread keeps in registers."""

_POINT_BLOCKS: Final = ("pixels", "axis_weights", "corners", "coordinates")
"""Blocks computed for each point, consumers before producers, the order that compute_at needs."""

_NEEDS_VECTOR_LOADS: Final = "needs the kernel variant with vector loads; this is the one for CPUs"


def dcnv3_grad_offset_mask(
    func: tirx.PrimFunc, target: Target, space: SearchSpace
) -> tirx.PrimFunc | Refusal:
    """Schedule the vector-load variant of the kernel that computes gradients of offset and mask.

    A thread computes the points of a group at one pixel. It keeps the gradient of the result in
    registers; point by point, it loads the four pixels in vectors, multiplies them by the gradient,
    and reduces the four products to the gradients of the point. A block gathers the gradients of
    its pixels in shared memory, because those of one thread would be written a few bytes at a time.
    """
    if refusal := refuse_other_kernels(func, "dcnv3_grad_offset_mask"):
        return refusal
    sch = s_tir.Schedule(func)
    names = block_names(sch)
    if "patch" not in names:
        return Refusal(_NEEDS_VECTOR_LOADS)
    spec = spec_of(func)
    store, dot = sch.get_sblock("store"), sch.get_sblock("dot")

    # Step 1. Stage the results in shared memory, before tiling. See tvm_workarounds:
    # cache-write-bounds.
    few_points = spec.points <= _MAX_UNROLLED_POINTS
    staged = [sch.cache_write(store, i, "shared.dyn") for i in (0, 1)] if few_points else []

    # Step 2. Bind pixels and groups to blocks and threads.
    block, thread = _bind_pixels(sch, store, spec, space, ThreadWork())
    _unroll_points(sch, sch.get_loops(store)[-1])
    for copy in staged:
        _copy_by_block(sch, copy, block, thread)

    # Step 3. Compute the gradients of a point, and what follows all points of a group.
    if spec.softmax:
        softmax_dot = sch.get_sblock("softmax_dot")
        _unroll_points(sch, *_compute_at(sch, softmax_dot, thread))
    (point,) = _compute_at(sch, sch.get_sblock("grad_mask"), thread)
    _unroll_points(sch, point)

    # Step 4. Multiply the gradient of the result by the four pixels of a point.
    own = max(divisors(spec.group_channels, _MAX_CHANNELS))
    patch_row, patch_column, channel = _compute_at(sch, dot, point, inner=3)
    part, channel = sch.split(channel, [None, own])
    sch.reorder(part, patch_row, patch_column, channel)
    unroll_all(sch, [patch_row, patch_column, channel])
    unroll_all(sch, sch.get_loops(sch.decompose_reduction(dot, part))[-2:])
    patch, grad = sch.get_sblock("patch"), sch.get_sblock("grad")
    _compute_at(sch, patch, patch_column)
    vectorize_copy(sch, patch, own)
    loaded = sch.cache_read(grad, 0, "local")
    at = thread if own == spec.group_channels else part
    unroll_all(sch, _compute_at(sch, grad, at))
    _compute_at(sch, loaded, at)
    vectorize_copy(sch, loaded, own)

    # Step 5. Compute coordinates and weights of a point, and the softmax of a group.
    for name in _POINT_BLOCKS:
        _compute_at(sch, sch.get_sblock(name), point)
    _load_offset(sch, point)
    _compute_softmax(sch, names, thread)
    if spec.softmax:
        sch.decompose_reduction(softmax_dot, sch.get_loops(softmax_dot)[-1])
    return set_min_blocks(sch.mod["main"], target, space)


def dcnv3_grad_x(
    func: tirx.PrimFunc, target: Target, space: SearchSpace
) -> tirx.PrimFunc | Refusal:
    """Schedule the vector-load variant of the kernel that computes the gradient of x.

    One kernel sets the gradient to zero. In the next, a thread computes the points of a group at
    one pixel, for one vector of the channels: it keeps the gradient of the result in registers, and
    adds it atomically, times the weights, to the four pixels of each point. Adjacent threads have
    adjacent vectors, so that whole sectors of memory are added to. As in the forward kernel, the
    threads of a group can share sampling points: each adds one vector for several adjacent groups
    or pixels, computes coordinates, weights and softmax of one of them, and gets those of the
    others by warp shuffles.
    """
    if refusal := refuse_other_kernels(func, "dcnv3_grad_x"):
        return refusal
    sch = s_tir.Schedule(func)
    names = block_names(sch)
    if "zero" not in names:
        return Refusal(_NEEDS_VECTOR_LOADS)
    spec = spec_of(func)
    zero, scatter = sch.get_sblock("zero"), sch.get_sblock("scatter")

    # Step 1. Set the gradient to zero, in vectors.
    batch, row, column, channel = sch.get_loops(zero)
    width = vector_elements(spec.channels, spec.accumulate_dtype)
    channel, vector = sch.split(channel, [None, width])
    place, lane = sch.split(sch.fuse(column, channel), [None, _ZERO_THREADS])
    bind_blocks(sch, [batch, row], [place])
    sch.bind(lane, "threadIdx.x")
    sch.vectorize(vector)

    # Step 2. Bind pixels, groups and vectors to blocks and threads.
    vectors = spec.group_channels // vector_elements(spec.group_channels, spec.accumulate_dtype)
    work = _pick_work(spec, vectors, space)
    sharing = work.sharing_threads
    _, thread = _bind_pixels(sch, scatter, spec, space, work, sch.get_loops(scatter)[-1])
    point, own_column, own_group, patch_row, patch_column = sch.get_loops(scatter)[-5:]
    _unroll_points(sch, point)
    unroll_all(sch, [own_column, own_group, patch_row, patch_column])

    # Step 3. Compute the weights of a point.
    _compute_at(sch, sch.cache_read(scatter, 0, "local"), own_group)  # one shuffle for all pixels
    for name, inner in (("pixels", 1), ("weights", 3), ("corners", 1), ("coordinates", 1)):
        unroll_all(sch, _compute_at(sch, sch.get_sblock(name), point, inner, sharing))
    _load_offset(sch, sch.get_loops(sch.get_sblock("coordinates"))[-2])

    # Step 4. Load the gradient of the result, and compute the softmax.
    grad = sch.get_sblock("grad")
    loaded = sch.cache_read(grad, 0, "local")
    own = _compute_at(sch, grad, thread, inner=3)
    unroll_all(sch, own)
    _compute_at(sch, loaded, own[1])
    vectorize_copy(sch, loaded, spec.group_channels // vectors)
    _compute_softmax(sch, names, thread, sharing)
    return set_min_blocks(sch.mod["main"], target, space)


def _pick_work(spec: DCNv3Spec, vectors: int, space: SearchSpace) -> ThreadWork:
    """Decide the outputs for which a thread adds one of the `vectors` of a group.

    By default it shares points with the threads of the other vectors, if enough threads remain.
    """
    works = {"one_group": ThreadWork()}
    columns = spec.output_size[1]
    if vectors in SHUFFLE_WIDTHS and columns is not None and spec.points > 1:
        # With one point: see tvm_workarounds: warp-in-place.
        if spec.group % vectors == 0:
            works["share_points"] = ThreadWork(groups=vectors)
        elif columns % vectors == 0:
            works["share_points"] = ThreadWork(columns=vectors)
    threads = (spec.batch or _DYNAMIC_IMAGES) * (spec.height or spec.width or 1) * spec.group
    enough = threads * (spec.width or 1) >= gpu.FULL_GPU_THREADS
    default = "share_points" if enough and "share_points" in works else "one_group"
    return works[space.pick("thread", list(works), default)]


def _bind_pixels(
    sch: s_tir.Schedule,
    block: SBlockRV,
    spec: DCNv3Spec,
    space: SearchSpace,
    work: ThreadWork,
    lane: LoopRV | None = None,
) -> tuple[LoopRV, LoopRV]:
    """Bind pixels and groups to blocks and threads; returns the loops over blocks and threads.

    The pixels of a block are in one row, or whole rows: with rectangles, TVM knows which results a
    block has. Threads of the loop `lane` are adjacent; their loops over points have two inside,
    over the columns and groups that they share.
    """
    batch, row, column, group, *inside = sch.get_loops(block)
    rows, columns = (static(sch.get(loop).extent) for loop in (row, column))
    sharing = work.sharing_threads
    group_threads = 1 if lane is None else (static(sch.get(lane).extent) or 1) // sharing
    most_groups = max(1, _THREADS // (group_threads * work.groups))
    groups = work.groups * max(divisors(spec.group // work.groups, most_groups))
    groups = space.pick("groups", divisors(spec.group), groups)
    whole = [
        size
        for size in _whole_pixels(rows, columns)
        if min(size, columns or size) % work.columns == 0
    ]
    powers = [number for number in _PIXELS if number <= (columns or number)]
    wanted = max(1, _THREADS // (groups * group_threads))
    pixels = space.pick("pixels", [*powers, *whole], _pixels(powers, whole, wanted))
    if sharing > 1 and (groups % work.groups or pixels not in whole):
        raise DecisionError(
            "threads can share points only in blocks without absent pixels",
            got=f"{groups} groups, {pixels} pixels",
            allowed=f"a multiple of {work.groups} groups, and {', '.join(map(str, whole))} pixels",
        )

    lanes = []
    if lane is not None:
        column, shared_columns = sch.split(column, [None, work.columns])
        group, shared_groups = sch.split(group, [None, work.groups])
        inside = [inside[0], shared_columns, shared_groups, *inside[1:-1]]
        lanes, groups = [lane], groups // work.groups
    row, own_rows = sch.split(row, [None, max(1, pixels // (columns or pixels))])
    column, own_columns = sch.split(column, [None, min(pixels, columns or pixels) // work.columns])
    slab, group = sch.split(group, [None, groups])
    sch.reorder(batch, row, column, slab, own_rows, own_columns, group, *lanes, *inside)
    if rows is None or columns is None:
        bind_blocks(sch, [batch, row], [column, slab])
    else:
        bind_blocks(sch, [batch], [row, column, slab])
    if lane is None or sharing == 1:
        thread = sch.fuse(own_rows, own_columns, group, *lanes)
    else:
        thread = lane
        sch.bind(sch.fuse(own_rows, own_columns, group), "threadIdx.y")
    sch.bind(thread, "threadIdx.x")
    return sch.get_loops(block)[-len(inside) - 2], thread


def _whole_pixels(rows: int | None, columns: int | None) -> list[int]:
    """List the numbers of pixels that divide an image of static size into equal rectangles."""
    if columns is None:
        return []
    several = [columns * count for count in divisors(rows or 1)]
    return sorted({size for size in [*divisors(columns), *several] if size <= MAX_BLOCK_THREADS})


def _pixels(powers: Sequence[int], whole: Sequence[int], wanted: int) -> int:
    """Choose about `wanted` pixels, of equal rectangles if possible."""
    fitting = [size for size in whole if size <= 2 * wanted]
    equal = min(fitting, key=lambda size: max(size / wanted, wanted / size), default=0)
    power = max(size for size in powers if size <= wanted)
    return equal if 4 * equal >= power else power


def _copy_by_block(sch: s_tir.Schedule, copy: SBlockRV, block: LoopRV, thread: LoopRV) -> None:
    """Copy the results of a thread block, adjacent threads adjacent vectors."""
    sch.reverse_compute_at(copy, block, preserve_unit_loops=True)
    *pixels, channel = sch.get_loops(copy)[-4:]
    tile = static(sch.get(pixels[-1]).extent)
    channels = static(sch.get(channel).extent) or 1
    width = vector_elements(channels, str(sch.get(copy).writes[0].source.dtype))
    channel, vector = sch.split(channel, [None, width])
    _, lane = sch.split(sch.fuse(*pixels, channel), [None, static(sch.get(thread).extent)])
    sch.bind(lane, "threadIdx.x")
    sch.vectorize(vector)
    # An axis of static extent for the pixels. See tvm_workarounds: dynamic-extents.
    sch.transform_layout(
        copy,
        ("read", 0),
        lambda n, y, x, c: (n, y, x // tile, x % tile, c),
        assume_injective_transform=True,
    )


def _load_offset(sch: s_tir.Schedule, point: LoopRV) -> None:
    """Load both offsets of a point at once: they are adjacent, and so aligned for one load."""
    offset = sch.cache_read(sch.get_sblock("coordinates"), 0, "local")
    sch.vectorize(*_compute_at(sch, offset, point))


def _compute_softmax(
    sch: s_tir.Schedule, names: Container[str], thread: LoopRV, sharing: int = 1
) -> None:
    """Compute the softmax of the points of a thread, if the kernel has one."""
    for name in ("softmax_sum", "softmax_exp", "softmax_max"):
        if name in names:
            block = sch.get_sblock(name)
            _unroll_points(sch, *_compute_at(sch, block, thread, sharing=sharing))
            if reduces(sch, block):
                sch.decompose_reduction(block, sch.get_loops(block)[-1])


def _compute_at(
    sch: s_tir.Schedule, block: SBlockRV, loop: LoopRV, inner: int = 1, sharing: int = 1
) -> list[LoopRV]:
    """Compute a block in registers inside a loop; returns its `inner` innermost loops.

    Threads that share points compute one output each; TVM lowers the scope "warp" to shuffles.
    """
    for index in range(len(sch.get(block).writes)):
        sch.set_scope(block, index, "warp" if sharing > 1 else "local")
    sch.compute_at(block, loop, preserve_unit_loops=True)
    loops = sch.get_loops(block)
    if sharing > 1:  # the loops over columns and groups
        sch.bind(sch.fuse(*loops[-inner - 2 : -inner]), "threadIdx.x")
    return list(loops[-inner:])


def _unroll_points(sch: s_tir.Schedule, point: LoopRV) -> None:
    if (static(sch.get(point).extent) or 0) <= _MAX_UNROLLED_POINTS:
        sch.unroll(point)
