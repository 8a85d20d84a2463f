"""DCNv3 on CPUs: rows in parallel, points and channels in vector registers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Final

from tvm import s_tir, tirx
from tvm.s_tir.schedule import LoopRV, SBlockRV
from tvm.target import Target

from dcnv3_tvm.op.expr import static
from dcnv3_tvm.schedules.blocks import block_names
from dcnv3_tvm.schedules.cpu.point_lanes import (
    reduce_points,
    separate_pairs,
    subtract_from_points,
)
from dcnv3_tvm.schedules.cpu.register_tiles import vector_unit
from dcnv3_tvm.schedules.cpu.vector_function import LLVM_TYPES
from dcnv3_tvm.schedules.rule import Refusal, refuse_other_kernels
from dcnv3_tvm.schedules.space import SearchSpace
from dcnv3_tvm.targets import num_cores, vector_lanes

_KERNELS: Final = ("dcnv3", "dcnv3_packed")

_STAGES: Final = (
    "gate",
    "pixels",
    "weights",
    "corners",
    "coordinates",
    "offsets",
    "softmax_share",
    "softmax_sum",
    "softmax_exp",
    "softmax_shift",
    "softmax_max",
)
"""Blocks before the sum, consumers before producers, the order that compute_at needs."""

_POINT_SUMS: Final = ("softmax_dot", "softmax_sum", "softmax_max")
"""Blocks that reduce over the points of a group."""

_BY_SHUFFLES: Final[Mapping[str, Callable[[s_tir.Schedule, SBlockRV, int, str], None]]] = {
    "offsets": separate_pairs,
    "softmax_max": reduce_points,
    "softmax_shift": subtract_from_points,
    "softmax_sum": reduce_points,
}
"""Blocks for which there are functions of shuffles, where their element types allow it."""

_MAX_UNROLLED_POINTS: Final = 16
"""Most points over which a loop is unrolled: 64 loads and multiply-adds."""

_MAX_GROUPS: Final = 16
"""Most groups whose points are computed in unrolled vectors: 9 of 16 lanes with a 3x3 kernel."""

_PART_COST: Final = 0.5
"""Cost of a part of a partial vector, next to that of a vector."""

_MAX_VECTORS: Final = 4
"""Most vector registers of sums in one pass over the points, by default."""

_MAX_LANE_VECTORS: Final = 2
"""The same where the weights of points are multiplied by lane: these stay in registers, too."""


def dcnv3(func: tirx.PrimFunc, target: Target, space: SearchSpace) -> tirx.PrimFunc | Refusal:
    """Schedule the scalar-load variant of the kernels of `dcnv3_tvm.op.tensorir`.

    A task is a row of output pixels, or a pixel where rows are few. At each pixel, coordinates,
    corners and weights of all groups are computed into a small buffer, vectorized over the points.
    Then, group by group, channels are accumulated in vector registers over the unrolled points. The
    buffer between the two makes each weight one broadcast load; in a fused loop, it would have to
    be shuffled out of a register.
    """
    if refusal := refuse_other_kernels(func, *_KERNELS):
        return refusal
    sch = s_tir.Schedule(func)
    names = block_names(sch)
    if "patch" in names:
        return Refusal("needs the kernel variant without vector loads; this is the one for GPUs")
    store, total = sch.get_sblock("store"), sch.get_sblock("sum")
    lanes = vector_lanes(target, str(sch.get(total).writes[0].source.dtype))

    # Step 1. Run rows in parallel. Pixels cost more, because each task allocates its buffers, but
    # are enough for every core.
    *_, group, channel = sch.get_loops(store)
    task, pixel = pick_task(sch, store, target, space)
    sch.parallel(task)

    # Step 2. Accumulate a tile of channels in registers over the points, for one or several groups.
    unit = vector_unit(target)
    channels = static(sch.get(channel).extent) or 1
    tiles = channel_tiles(channels, lanes)
    default = channel_tile(channels, lanes)
    if unit.by_lane:
        default = max((t for t in tiles if t <= _MAX_LANE_VECTORS * lanes), default=default)
    tile = space.pick("channels", tiles, default)
    groups = static(sch.get(group).extent) or 1
    group_tiles = [size for size in (1, 2, 4) if groups % size == 0]
    # Two groups at once wait less for each other's loads, if their sums, of two rows, fit half of
    # the registers.
    fit = 2 in group_tiles and 1 < tile <= unit.registers // 8 * lanes
    group_tile = space.pick("groups", group_tiles, 2 if fit else 1)
    group, _ = sch.split(group, [None, group_tile])
    sch.compute_at(total, group, preserve_unit_loops=True)
    *_, inner_group, point, row, channel = sch.get_loops(total)
    sch.reorder(point, inner_group, row)
    sch.unroll(inner_group)
    sch.unroll(row)
    if tile > 1:
        outer, channel = sch.split(channel, [None, tile])
        sch.reorder(outer, point, inner_group, row, channel)
        sch.vectorize(channel)
        sch.vectorize(sch.split(sch.get_loops(store)[-1], [None, tile])[1])
    unroll_points(sch, point)

    # Step 3. Compute the stages before the sum for all groups of a pixel at once.
    compute_stages_at(sch, [name for name in _STAGES if name in names], pixel, lanes)

    # Step 4. Initialize sums ahead of their loops.
    init = sch.decompose_reduction(total, point)
    if tile > 1:
        sch.vectorize(sch.get_loops(init)[-1])
    return sch.mod["main"]


def pick_task(
    sch: s_tir.Schedule, store: SBlockRV, target: Target, space: SearchSpace
) -> tuple[LoopRV, LoopRV]:
    """Decide what a task computes; returns its loop, and the loop over its pixels.

    Parameters
    ----------
    sch : Schedule
        Schedule to change.
    store : SBlockRV
        Block whose outermost loops are over image, row and column of the output.
    target : tvm.target.Target
        Target to schedule for.
    space : SearchSpace
        Decides ``task``: a row of output pixels, or a pixel.
    """
    batch, row, column, *_ = sch.get_loops(store)
    images, rows = static(sch.get(batch).extent), static(sch.get(row).extent)
    few = images is not None and rows is not None and images * rows < 2 * num_cores(target)
    tasks, default = (["pixel"], "pixel") if few else (["row", "pixel"], "row")
    if space.pick("task", tasks, default) == "pixel":
        pixel = sch.fuse(batch, row, column)
        return pixel, pixel
    return sch.fuse(batch, row), column


def channel_tiles(channels: int, lanes: int) -> list[int]:
    """List the candidates for the channels in registers at once: whole vectors."""
    return [
        size for size in range(lanes, 2 * _MAX_VECTORS * lanes + 1, lanes) if channels % size == 0
    ]


def channel_tile(channels: int, lanes: int) -> int:
    """Choose how many channels of a group to accumulate in registers at once.

    Parameters
    ----------
    channels : int
        Channels of a group.
    lanes : int
        Elements of a vector register.

    Returns
    -------
    int
        The largest divisor of `channels` that fits `_MAX_VECTORS` registers; 1, which leaves the
        loop to LLVM's vectorizer, if that would fill less than half a register.
    """
    largest = max(d for d in range(1, _MAX_VECTORS * lanes + 1) if channels % d == 0)
    return largest if largest == channels or 2 * largest >= lanes else 1


def compute_stages_at(sch: s_tir.Schedule, names: Sequence[str], loop: LoopRV, lanes: int) -> None:
    """Compute blocks at a loop, consumers before producers, in vectors of points or groups."""
    for name in names:
        sch.compute_at(sch.get_sblock(name), loop, preserve_unit_loops=True)
    for name in names:
        _vectorize_stage(sch, name, lanes)


def _vectorize_stage(sch: s_tir.Schedule, name: str, lanes: int) -> None:
    block = sch.get_sblock(name)
    loops = sch.get_loops(block)
    several = all((static(sch.get(loop).extent) or 1) > 1 for loop in loops[-2:])
    if name in _BY_SHUFFLES and several:
        dtype = str(sch.get(block).writes[0].source.dtype)
        same = all(str(region.source.dtype) == dtype for region in sch.get(block).reads)
        if same and dtype in LLVM_TYPES:
            _BY_SHUFFLES[name](sch, block, lanes, dtype)
            return
    if name in _POINT_SUMS:
        unroll_points(sch, loops[-1])
        sch.decompose_reduction(block, loops[-1])
    elif name in ("offsets", "softmax_share", "gate"):
        sch.vectorize(loops[-1])
    else:
        _vectorize_points(sch, loops, lanes, corners=name == "weights")


def _vectorize_points(
    sch: s_tir.Schedule, loops: list[LoopRV], lanes: int, *, corners: bool
) -> None:
    """Vectorize the innermost loops, over groups and points, together."""
    *_, group, point = loops
    groups, points = (static(sch.get(loop).extent) or 1 for loop in (group, point))
    outer, group = sch.split(group, [None, groups_at_once(groups, points, lanes)])
    unrolled = loops[-4:-2] if corners else []
    sch.reorder(outer, *unrolled, group, point)
    for loop in unrolled:
        sch.unroll(loop)
    lane = sch.fuse(group, point)
    if (static(sch.get(lane).extent) or 1) % lanes == 0:
        vector, lane = sch.split(lane, [None, lanes])
        sch.unroll(vector)
    sch.vectorize(lane)


def groups_at_once(groups: int, points: int, lanes: int) -> int:
    """Choose how many groups to compute at once: those whose points fill vectors at least cost.

    A partial vector is loaded and stored in parts of 1, 2, 4 ... elements.
    """

    def cost(size: int) -> float:
        vectors, rest = divmod(size * points, lanes)
        return (vectors + (rest > 0) + _PART_COST * rest.bit_count()) / size

    most = min(groups, _MAX_GROUPS)
    sizes = [size for size in range(1, most + 1) if groups % size == 0]
    return min(sizes, key=lambda size: (cost(size), size))


def unroll_points(sch: s_tir.Schedule, point: LoopRV) -> None:
    """Unroll a loop over the points of a group, unless there are many."""
    if (static(sch.get(point).extent) or 0) <= _MAX_UNROLLED_POINTS:
        sch.unroll(point)
