"""DCNv3 on CPUs: rows in parallel, points and channels in vector registers."""

from __future__ import annotations

from typing import Final

from tvm import s_tir, tirx
from tvm.s_tir.schedule import LoopRV
from tvm.target import Target

from dcnv3_tvm.schedules.rule import Refusal, refuse_other_kernels
from dcnv3_tvm.schedules.space import SearchSpace
from dcnv3_tvm.targets import num_cores, vector_lanes

_KERNELS: Final = ("dcnv3", "dcnv3_packed")

# Consumers before producers: the order in which compute_at moves them.
_STAGES: Final = (
    "gate",
    "pixels",
    "weights",
    "corners",
    "coordinates",
    "softmax_sum",
    "softmax_exp",
    "softmax_max",
)

_MAX_UNROLLED_POINTS: Final = 16
"""Beyond, the loop over the points stays a loop: 16 points are 64 loads and multiply-adds."""

_MAX_VECTORS: Final = 4
"""Accumulators of one pass over the points, in vector registers."""


def dcnv3(func: tirx.PrimFunc, target: Target, space: SearchSpace) -> tirx.PrimFunc | Refusal:
    """Schedule the DCNv3 kernels of `dcnv3_tvm.op.tensorir`.

    One thread takes whole output rows (pixels, where rows are few). At each pixel the coordinates,
    corners and weights of all groups are computed into a small buffer, vectorised over the points;
    then, group by group, the channels are summed in vector registers over the unrolled points.
    Keeping the two apart makes a weight one broadcasting load, where a fused loop would shuffle
    it out of a register.

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
    if refusal := refuse_other_kernels(func, *_KERNELS):
        return refusal
    sch = s_tir.Schedule(func)
    root = sch.get_sblock("root")
    names = {sch.get(block).name_hint for block in sch.get_child_blocks(root)}
    store, total = sch.get_sblock("store"), sch.get_sblock("sum")
    lanes = vector_lanes(target, str(sch.get(total).writes[0].source.dtype))

    batch, row, col, group, channel = sch.get_loops(store)
    images, rows = _extent(sch, batch), _extent(sch, row)
    few = images is not None and rows is not None and images * rows < 2 * num_cores(target)
    # Pixels are costlier tasks (each allocates its buffers), but enough of them for every core.
    if space.pick("task", ["pixel"] if few else ["row", "pixel"], "pixel" if few else "row") == (
        "pixel"
    ):
        task = pixel = sch.fuse(batch, row, col)
    else:
        task, pixel = sch.fuse(batch, row), col
    channels = _extent(sch, channel) or 1
    tile = space.pick("channels", channel_tiles(channels, lanes), channel_tile(channels, lanes))

    groups = _extent(sch, group) or 1
    together = space.pick("groups", [n for n in (1, 2, 4) if groups % n == 0], 1)
    group, _ = sch.split(group, [None, together])
    sch.compute_at(total, group, preserve_unit_loops=True)
    *_, inner, point, channel = sch.get_loops(total)
    sch.reorder(point, inner)
    sch.unroll(inner)
    if tile > 1:
        outer, channel = sch.split(channel, [None, tile])
        sch.reorder(outer, point, inner, channel)
        sch.vectorize(channel)
        sch.vectorize(sch.split(sch.get_loops(store)[-1], [None, tile])[1])
    if (_extent(sch, point) or 0) <= _MAX_UNROLLED_POINTS:
        sch.unroll(point)

    # Of all groups at once, or of each group before it is summed, in a smaller buffer.
    stages = {"pixel": pixel, "group": group}[space.pick("stages", ["pixel", "group"], "pixel")]
    for name in _STAGES:
        if name in names:
            _schedule_stage(sch, name, stages)
    sch.parallel(task)

    for reduction in ("sum", "softmax_sum", "softmax_max"):
        if reduction not in names:
            continue
        block = sch.get_sblock(reduction)
        loops = sch.get_loops(block)
        init = sch.decompose_reduction(block, point if reduction == "sum" else loops[-1])
        if reduction == "sum" and tile > 1:
            sch.vectorize(sch.get_loops(init)[-1])
    return sch.mod["main"]


def channel_tiles(channels: int, lanes: int) -> list[int]:
    """List the channels in registers at once among which a tuner may choose: whole vectors."""
    return [
        size for size in range(lanes, 2 * _MAX_VECTORS * lanes + 1, lanes) if channels % size == 0
    ]


def channel_tile(channels: int, lanes: int) -> int:
    """Choose how many channels of a group are summed in registers at once.

    Parameters
    ----------
    channels : int
        Channels of a group.
    lanes : int
        Elements of a vector register.

    Returns
    -------
    int
        The largest divisor that fits the registers; 1 where that would leave vectors half
        empty, and a plain loop is better left to LLVM's vectoriser.
    """
    largest = max(d for d in range(1, _MAX_VECTORS * lanes + 1) if channels % d == 0)
    return largest if largest == channels or 2 * largest >= lanes else 1


def _schedule_stage(sch: s_tir.Schedule, name: str, pixel: LoopRV) -> None:
    """Compute a block per pixel, its last loop (points, groups) vectorised; reduced, unrolled."""
    block = sch.get_sblock(name)
    sch.compute_at(block, pixel, preserve_unit_loops=True)
    loops = sch.get_loops(block)
    if name in ("softmax_sum", "softmax_max"):
        if (_extent(sch, loops[-1]) or 0) <= _MAX_UNROLLED_POINTS:
            sch.unroll(loops[-1])
        return
    sch.vectorize(loops[-1])
    if name == "weights":
        sch.unroll(loops[-2])
        sch.unroll(loops[-3])


def _extent(sch: s_tir.Schedule, loop: LoopRV) -> int | None:
    """Extent of a loop; None where it is symbolic."""
    extent = sch.get(loop).extent
    return int(extent) if isinstance(extent, tirx.IntImm) else None
