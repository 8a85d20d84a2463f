"""Gradients of DCNv3 on CPUs: offset and mask by output pixels, x by groups of images."""

from __future__ import annotations

from typing import Final

from tvm import s_tir, tirx
from tvm.s_tir.schedule import LoopRV, SBlockRV
from tvm.target import Target

from dcnv3_tvm.op.expr import static
from dcnv3_tvm.schedules.blocks import block_names
from dcnv3_tvm.schedules.cpu.dcnv3 import (
    compute_stages_at,
    pick_task,
    unroll_points,
)
from dcnv3_tvm.schedules.cpu.lane_sum import split_lanes, sum_lanes
from dcnv3_tvm.schedules.cpu.loops import accumulate_tile, vectorize_innermost
from dcnv3_tvm.schedules.rule import Refusal, refuse_other_kernels
from dcnv3_tvm.schedules.space import SearchSpace
from dcnv3_tvm.targets import num_cores, vector_lanes

_FEW_CORES: Final = 8
"""Most cores for which two groups of an image are one task."""

_STAGES: Final = (
    "grad",
    "pixels",
    "weights",
    "axis_weights",
    "corners",
    "coordinates",
    "offsets",
    "softmax_sum",
    "softmax_exp",
    "softmax_shift",
    "softmax_max",
)
"""Blocks before the sums, consumers before producers, the order that compute_at needs."""


def dcnv3_grad_offset_mask(
    func: tirx.PrimFunc, target: Target, space: SearchSpace
) -> tirx.PrimFunc | Refusal:
    """Schedule the kernel that computes the gradients of offset and mask.

    A task is a row of output pixels, or a pixel where rows are few. Coordinates and weights of a
    pixel are computed as in the forward kernel. Then, group by group, the gradient is multiplied
    by the four pixels of each point in vectors of channels, whose lanes are added by shuffles; the
    rest is vectorized over the points.
    """
    if refusal := refuse_other_kernels(func, "dcnv3_grad_offset_mask"):
        return refusal
    sch = s_tir.Schedule(func)
    names = block_names(sch)
    store, dot = sch.get_sblock("store"), sch.get_sblock("dot")

    # Step 1. Run rows or pixels in parallel, with the stages of all groups of a pixel first.
    task, pixel = pick_task(sch, store, target, space)
    sch.parallel(task)
    *_, group, point = sch.get_loops(store)
    sch.vectorize(point)

    # Step 2. Compute what follows the products of a group, consumers before producers.
    dtype = str(sch.get(dot).writes[0].source.dtype)
    lanes = vector_lanes(target, dtype)
    present = [name for name in ("softmax_dot", "grad_mask") if name in names]
    compute_stages_at(sch, present, group, lanes)

    # Step 3. Multiply gradient and pixels of a point, in vectors of channels.
    partial = split_lanes(sch, dot, lanes)
    _sum_products(sch, dot, partial, group, task, dtype)

    # Step 4. Compute the stages before, for all groups of a pixel at once.
    compute_stages_at(sch, [name for name in _STAGES if name in names], pixel, lanes)
    return sch.mod["main"]


def _sum_products(
    sch: s_tir.Schedule,
    dot: SBlockRV,
    partial: SBlockRV | None,
    group: LoopRV,
    task: LoopRV,
    dtype: str,
) -> None:
    """Compute the sums over channels of a group: in vectors, then over the lanes."""
    sch.compute_at(dot, group, preserve_unit_loops=True)
    if partial is None:
        *_, point, row, column, channel = sch.get_loops(dot)
        unroll_points(sch, point)
        sch.unroll(row)
        sch.unroll(column)
        sch.decompose_reduction(dot, channel)
        return
    *_, point, row, column, lane = sch.get_loops(dot)
    sch.reorder(row, column, point, lane)
    sch.unroll(row)
    sch.unroll(column)
    sch.compute_at(partial, column, preserve_unit_loops=True)
    *_, own_point, _, _, own_lane, step = sch.get_loops(partial)
    unroll_points(sch, own_point)
    sch.reorder(step, own_lane)
    accumulate_tile(sch, partial, [own_lane], step)
    sum_lanes(sch, dot, point, task, dtype)


def dcnv3_grad_x(
    func: tirx.PrimFunc, target: Target, space: SearchSpace
) -> tirx.PrimFunc | Refusal:
    """Schedule the kernel that computes the gradient of x.

    A task is a group of an image, or several. It goes through the output pixels in order and adds
    the weighted gradient to its own channels of the image. So no two tasks write to the same place,
    and the result does not depend on the number of threads.
    """
    if refusal := refuse_other_kernels(func, "dcnv3_grad_x"):
        return refusal
    sch = s_tir.Schedule(func)
    names = block_names(sch)
    scatter = sch.get_sblock("scatter")
    lanes = vector_lanes(target, str(sch.get(scatter).writes[0].source.dtype))

    # Step 1. Run groups of images in parallel.
    batch, group, row, pixel, point, patch_row, patch_column, _ = sch.get_loops(scatter)
    groups = static(sch.get(group).extent) or 1
    # Adjacent groups share pages and prefetched lines; fewer tasks may not suffice for many cores.
    default = 2 if groups % 2 == 0 and num_cores(target) <= _FEW_CORES else 1
    own = space.pick("groups", [size for size in (1, 2, 4) if groups % size == 0], default)
    group, own_groups = sch.split(group, [None, own])
    sch.reorder(batch, group, row, pixel, own_groups, point)
    task = sch.fuse(batch, group)
    sch.parallel(task)

    # Step 2. Scatter in vectors of channels, over unrolled points.
    unroll_points(sch, point)
    sch.unroll(patch_row)
    sch.unroll(patch_column)
    vectorize_innermost(sch, scatter, lanes)

    # Step 3. Compute the stages of a pixel.
    compute_stages_at(sch, [name for name in _STAGES if name in names], pixel, lanes)

    # Step 4. Set the groups to zero ahead of the loops over pixels.
    vectorize_innermost(sch, sch.decompose_reduction(scatter, row), lanes)
    return sch.mod["main"]
