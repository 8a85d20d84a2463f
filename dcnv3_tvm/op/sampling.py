"""The blocks that the kernels of `dcnv3_tvm.op.tensorir` are made of, which schedules move.

========================= ========================================================================
block                     what it computes, for one (n, ho, wo, g) and point p
========================= ========================================================================
softmax_max, _exp, _sum   only with ``spec.softmax``: the stable softmax of the logits, undivided
coordinates               where the point samples: (y, x) in pixels of x
corners                   row and column of the upper left of the four pixels read, inside x
weights                   the four bilinear weights times the mask
pixels                    only where the width is static or for GPUs: where the first of the four
                          pixels is, as one index; for GPUs where its channels of the group are,
                          counted in vectors of the tensor x
patch                     only for GPUs: the four pixels read, for each channel
sum                       weights times pixels, over points, for each channel
gate                      only with ``center_feature``: the part of the undeformed pixel, by group
center                    only with it and for GPUs: that pixel, for each channel
store                     the division of the softmax, the blend, and the one rounding to the output
                          type
========================= ========================================================================

Coordinates, rows and columns are relative to the middle of the undeformed kernel at the output
pixel, an integer place: so their rounding errors do not grow with the size of the image.

Borders are branchless. The 2x2 patch that is read is moved inside the image, and the weight of a
pixel at distance d from the sampling point is ``max(0, 1 - |d|)`` per axis, which is zero for
every pixel of the patch that the bilinear formula does not use. Hence no offset, NaN and infinity
included, reads out of bounds; and a pixel that is not finite may reach outputs whose sampling
points lie outside the image, as zero times infinity.

Extents and loop variables are int64, so that more than 2**31 elements are addressed correctly.
"""

# No `from __future__ import annotations`: the TVMScript parser evaluates the annotations.
from typing import Any, Final, NamedTuple

from tvm import tirx
from tvm.script import tirx as T

from dcnv3_tvm import gpu
from dcnv3_tvm.errors import InvalidArgumentError
from dcnv3_tvm.op.expr import int64
from dcnv3_tvm.op.math import exp
from dcnv3_tvm.spec import DCNv3Spec

MAX_SIDE = 2**24
"""Largest height and width: to here float32 holds every integer, and the borders are exact."""

_CORNERS: Final = ((0, 0), (0, 1), (1, 0), (1, 1))
"""Row and column of the pixels of a patch."""


class Sizes(NamedTuple):
    """Extents as int64 expressions; variables where the problem is symbolic."""

    batch: Any
    height: Any
    width: Any
    out_height: Any
    out_width: Any


def extents_of(spec: DCNv3Spec) -> tuple[Any, Any, Any]:
    """Return the channels of x, of offsets and of masks."""
    points = spec.group * spec.points
    return int64(spec.channels), int64(points * 2), int64(points)


def vector_channels(spec: DCNv3Spec) -> int:
    """Return how many channels of a group a thread of a GPU loads at once."""
    return gpu.vector_elements(spec.group_channels, spec.dtype)


def sizes_of(spec: DCNv3Spec) -> Sizes:
    """Return the sizes of a problem, with variables for those that are open.

    Raises
    ------
    InvalidArgumentError
        If a side is longer than `MAX_SIDE`.
    """
    given = {"n": spec.batch, "height": spec.height, "width": spec.width}
    for name in ("height", "width"):
        if (given[name] or 0) > MAX_SIDE:
            raise InvalidArgumentError(
                f"the {name} is too large", got=given[name], allowed=f"at most {MAX_SIDE}"
            )
    batch, height, width = (
        tirx.Var(name, "int64") if size is None else int64(size) for name, size in given.items()
    )
    outputs = []
    for axis, (size, known) in enumerate(zip((height, width), spec.output_size, strict=True)):
        if known is not None:
            outputs.append(int64(known))
            continue
        extent = spec.dilation[axis] * (spec.kernel_size[axis] - 1) + 1
        padded = size + int64(2 * spec.pad[axis] - extent)
        outputs.append(tirx.floordiv(padded, int64(spec.stride[axis])) + int64(1))
    return Sizes(batch, height, width, *outputs)


def blocks(
    spec: DCNv3Spec,
    sizes: Sizes,
    *,
    mask_start: int,
    stored: str,
    gather: bool,
    center_feature: bool,
) -> Any:
    """Return the body shared by the kernels, as a TVMScript inline function.

    Parameters
    ----------
    spec, sizes
        The problem and its extents.
    mask_start : int
        Where the mask begins along the last axis of the tensor that holds it.
    stored : str
        Element type of the output.
    gather : bool
        As in `dcnv3`.
    center_feature : bool
        As in `dcnv3_packed`; the logits of the blend lie behind those of the mask.
    """
    n, h, w, ho, wo = sizes
    acc_type = spec.accumulate_dtype
    softmax = spec.softmax
    exponential = tirx.exp if gather else exp
    kernel_height = spec.kernel_size[0]
    groups, points = int64(spec.group), int64(spec.points)
    group_channels = int64(spec.group_channels)
    two = int64(2)
    # 1 where the patch has a second row (column), 0 in an image of one row (column).
    row_step = tirx.min(h - int64(1), int64(1))
    col_step = tirx.min(w - int64(1), int64(1))

    def real(value: float) -> Any:
        return tirx.const(value, acc_type)

    scale = real(spec.offset_scale)
    half = [(d * (k - 1)) >> 1 for d, k in zip(spec.dilation, spec.kernel_size, strict=True)]

    def point_grid(p: Any, axis: int) -> Any:
        """Place of point p in the undeformed kernel, relative to its middle."""
        if spec.remove_center:
            # The centre is the middle one: this adds 1 from there on (TVM fails on a vector of
            # comparisons that it can decide).
            p = p + tirx.floordiv(p, spec.points // 2)
        index = tirx.floormod(p, kernel_height) if axis == 0 else tirx.floordiv(p, kernel_height)
        return index * int64(spec.dilation[axis]) - int64(half[axis])

    def base(pixel: Any, axis: int) -> Any:
        """Integer place, in x, of the middle of the undeformed kernel of an output pixel."""
        return pixel * int64(spec.stride[axis]) + int64(half[axis] - spec.pad[axis])

    def position(p: Any, learned: Any, axis: int) -> Any:
        grid = tirx.Cast(acc_type, point_grid(p, axis))
        return scale * (grid + tirx.Cast(acc_type, learned))

    def first(coordinate: Any, pixel: Any, axis: int) -> Any:
        """Relative index of the first of two pixels along an axis: inside x, whatever comes in.

        An integer, left in the type of the coordinates, which the weights need.
        """
        low = -base(pixel, axis)
        high = low + tirx.max(sizes[1 + axis] - int64(2), int64(0))
        # By way of int32, because GPUs are slow at converting int64.
        low, high = (tirx.Cast(acc_type, tirx.Cast("int32", end)) for end in (low, high))
        if gather:
            # Of NaN and a number, GPUs take the number as the smaller one. A Select would be a
            # branch there.
            return tirx.floor(tirx.max(tirx.min(coordinate, high), low))
        # A comparison with NaN is false, so that NaN gives the low end.
        inside = tirx.Select(coordinate > low, tirx.min(coordinate, high), low)
        return tirx.floor(inside)

    def tent(coordinate: Any, index: Any, corner: int, step: Any) -> Any:
        """Weight of pixel ``index + corner`` along an axis."""
        distance = coordinate - index - tirx.Cast(acc_type, corner)
        weight = real(1) - tirx.abs(distance)
        weight = tirx.max(weight, real(0))
        if _is_one(step):
            return weight
        # Without a second pixel its weight is zero.
        return weight * tirx.Cast(acc_type, corner * (step - int64(1)) + int64(1))

    linear = gather or spec.width is not None
    vector = vector_channels(spec)
    known = (spec.height or 2**31) * (spec.width or 2**31)
    if gather:
        known *= (spec.batch or 2**31) * spec.channels // vector
    pixel_type = "int32" if known < 2**31 else "int64"

    def index_of(row: Any, col: Any, b: Any, y: Any, x: Any, g: Any) -> Any:
        """Return what `pixels` holds of a relative row and column."""
        row, col, pitch = (tirx.Cast(pixel_type, value) for value in (_int32(row), _int32(col), w))
        if not gather:
            top, left = (
                tirx.Cast(pixel_type, base(pixel, axis)) for axis, pixel in enumerate((y, x))
            )
            return (row + top) * pitch + (col + left)
        # All that is the same for every point apart, so that it is computed once.
        vectors = int64(spec.channels // vector)
        origin = (b * h + base(y, 0)) * w + base(x, 1)
        origin = origin * vectors + g * int64(spec.group_channels // vector)
        return (row * pitch + col) * tirx.Cast(pixel_type, vectors) + tirx.Cast(pixel_type, origin)

    def from_index(index: Any, r: Any, s: Any) -> tuple[Any, Any]:
        """Row and column of corner (r, s) of the patch whose first pixel has an index.

        They simplify back to that index when the buffer is flattened, because the width is static.
        """
        index = tirx.Cast("int64", index)
        return tirx.floordiv(index, w) + row_step * r, tirx.floormod(index, w) + col_step * s

    def from_vector(index: Any, r: Any, s: Any, channel: Any) -> Any:
        """Place, in the flattened tensor x, of a channel of a group at corner (r, s).

        Added up without a sign: nvcc would make additions of 64 bits out of one with a sign.
        """
        unsigned = f"u{pixel_type}"
        found = tirx.Cast(unsigned, index) + tirx.Cast(
            unsigned, tirx.floordiv(channel, int64(vector))
        )
        corner = (row_step * r * w + col_step * s) * int64(spec.channels)
        return (
            tirx.Cast("int64", found) * int64(vector)
            + corner
            + tirx.floormod(channel, int64(vector))
        )

    def from_pair(row: Any, col: Any, y: Any, x: Any, r: Any, s: Any) -> tuple[Any, Any]:
        """Row and column of corner (r, s) of the patch at a relative row and column."""
        top = tirx.Cast("int64", tirx.Cast("int32", row)) + base(y, 0)
        left = tirx.Cast("int64", tirx.Cast("int32", col)) + base(x, 1)
        return top + row_step * r, left + col_step * s

    @T.inline
    def body(X, Offset, Mask, Out):
        pos_y = T.sblock_alloc_buffer((n, ho, wo, groups, points), acc_type)
        pos_x = T.sblock_alloc_buffer((n, ho, wo, groups, points), acc_type)
        row = T.sblock_alloc_buffer((n, ho, wo, groups, points), acc_type)
        col = T.sblock_alloc_buffer((n, ho, wo, groups, points), acc_type)
        weight = T.sblock_alloc_buffer((n, ho, wo, groups, two, two, points), acc_type)
        acc = T.sblock_alloc_buffer((n, ho, wo, groups, group_channels), acc_type)
        if linear:
            pixel = T.sblock_alloc_buffer((n, ho, wo, groups, points), pixel_type)
        if gather:
            patch = T.sblock_alloc_buffer(
                (n, ho, wo, groups, points, two, two, group_channels), spec.dtype
            )
        if softmax:
            peak = T.sblock_alloc_buffer((n, ho, wo, groups), acc_type)
            part = T.sblock_alloc_buffer((n, ho, wo, groups, points), acc_type)
            total = T.sblock_alloc_buffer((n, ho, wo, groups), acc_type)
            for i0, i1, i2, i3, i4 in T.grid(n, ho, wo, groups, points):
                with T.sblock("softmax_max"):
                    b, y, x, g, p = T.axis.remap("SSSSR", [i0, i1, i2, i3, i4])
                    with T.init():
                        peak[b, y, x, g] = T.min_value(acc_type)
                    peak[b, y, x, g] = T.max(
                        peak[b, y, x, g],
                        T.Cast(acc_type, Mask[b, y, x, mask_start + g * points + p]),
                    )
            for i0, i1, i2, i3, i4 in T.grid(n, ho, wo, groups, points):
                with T.sblock("softmax_exp"):
                    b, y, x, g, p = T.axis.remap("SSSSS", [i0, i1, i2, i3, i4])
                    part[b, y, x, g, p] = exponential(
                        T.Cast(acc_type, Mask[b, y, x, mask_start + g * points + p])
                        - peak[b, y, x, g]
                    )
            for i0, i1, i2, i3, i4 in T.grid(n, ho, wo, groups, points):
                with T.sblock("softmax_sum"):
                    b, y, x, g, p = T.axis.remap("SSSSR", [i0, i1, i2, i3, i4])
                    with T.init():
                        total[b, y, x, g] = real(0)
                    total[b, y, x, g] = total[b, y, x, g] + part[b, y, x, g, p]
        for i0, i1, i2, i3, i4 in T.grid(n, ho, wo, groups, points):
            with T.sblock("coordinates"):
                b, y, x, g, p = T.axis.remap("SSSSS", [i0, i1, i2, i3, i4])
                pos_x[b, y, x, g, p] = position(p, Offset[b, y, x, (g * points + p) * two], 1)
                pos_y[b, y, x, g, p] = position(p, Offset[b, y, x, (g * points + p) * two + 1], 0)
        for i0, i1, i2, i3, i4 in T.grid(n, ho, wo, groups, points):
            with T.sblock("corners"):
                b, y, x, g, p = T.axis.remap("SSSSS", [i0, i1, i2, i3, i4])
                row[b, y, x, g, p] = first(pos_y[b, y, x, g, p], y, 0)
                col[b, y, x, g, p] = first(pos_x[b, y, x, g, p], x, 1)
        for i0, i1, i2, i3, dy, dx, i4 in T.grid(n, ho, wo, groups, two, two, points):
            with T.sblock("weights"):
                b, y, x, g, r, s, p = T.axis.remap("SSSSSSS", [i0, i1, i2, i3, dy, dx, i4])
                if softmax:
                    amount = T.meta_var(part[b, y, x, g, p])
                else:
                    amount = T.meta_var(
                        T.Cast(acc_type, Mask[b, y, x, mask_start + g * points + p])
                    )
                # In this order, so that what is the same for both columns comes first.
                weight[b, y, x, g, r, s, p] = (
                    amount
                    * tent(pos_y[b, y, x, g, p], row[b, y, x, g, p], r, row_step)
                    * tent(pos_x[b, y, x, g, p], col[b, y, x, g, p], s, col_step)
                )
        if linear:
            for i0, i1, i2, i3, i4 in T.grid(n, ho, wo, groups, points):
                with T.sblock("pixels"):
                    b, y, x, g, p = T.axis.remap("SSSSS", [i0, i1, i2, i3, i4])
                    pixel[b, y, x, g, p] = index_of(
                        row[b, y, x, g, p], col[b, y, x, g, p], b, y, x, g
                    )
        if gather:
            for i0, i1, i2, i3, i4, dy, dx, c in T.grid(
                n, ho, wo, groups, points, two, two, group_channels
            ):
                with T.sblock("patch"):
                    b, y, x, g, p, r, s, ch = T.axis.remap(
                        "SSSSSSSS", [i0, i1, i2, i3, i4, dy, dx, c]
                    )
                    chan = T.meta_var(g * group_channels + ch)
                    # Which pixels are read depends on data: the region is the whole image.
                    T.reads(pixel[b, y, x, g, p], X[b, 0:h, 0:w, chan])
                    T.writes(patch[b, y, x, g, p, r, s, ch])
                    # In the first row, far beyond its end: flattened, it is the same place.
                    patch[b, y, x, g, p, r, s, ch] = X[
                        0, 0, 0, from_vector(pixel[b, y, x, g, p], r, s, ch)
                    ]
            for i0, i1, i2, i3, i4, dy, dx, c in T.grid(
                n, ho, wo, groups, points, two, two, group_channels
            ):
                with T.sblock("sum"):
                    b, y, x, g, p, r, s, ch = T.axis.remap(
                        "SSSSRRRS", [i0, i1, i2, i3, i4, dy, dx, c]
                    )
                    with T.init():
                        acc[b, y, x, g, ch] = real(0)
                    acc[b, y, x, g, ch] = acc[b, y, x, g, ch] + weight[
                        b, y, x, g, r, s, p
                    ] * T.Cast(acc_type, patch[b, y, x, g, p, r, s, ch])
        else:
            for i0, i1, i2, i3, i4, c in T.grid(n, ho, wo, groups, points, group_channels):
                with T.sblock("sum"):
                    b, y, x, g, p, ch = T.axis.remap("SSSSRS", [i0, i1, i2, i3, i4, c])
                    chan = T.meta_var(g * group_channels + ch)
                    if linear:
                        T.reads(
                            weight[b, y, x, g, 0:2, 0:2, p],
                            pixel[b, y, x, g, p],
                            X[b, 0:h, 0:w, chan],
                        )
                        corners = T.meta_var(
                            [from_index(pixel[b, y, x, g, p], r, s) for r, s in _CORNERS]
                        )
                    else:
                        T.reads(
                            weight[b, y, x, g, 0:2, 0:2, p],
                            row[b, y, x, g, p],
                            col[b, y, x, g, p],
                            X[b, 0:h, 0:w, chan],
                        )
                        corners = T.meta_var(
                            [
                                from_pair(row[b, y, x, g, p], col[b, y, x, g, p], y, x, r, s)
                                for r, s in _CORNERS
                            ]
                        )
                    T.writes(acc[b, y, x, g, ch])
                    with T.init():
                        acc[b, y, x, g, ch] = real(0)
                    # The four corners are added first: a shorter chain of dependent additions.
                    acc[b, y, x, g, ch] = acc[b, y, x, g, ch] + (
                        weight[b, y, x, g, 0, 0, p]
                        * T.Cast(acc_type, X[b, corners[0][0], corners[0][1], chan])
                        + weight[b, y, x, g, 0, 1, p]
                        * T.Cast(acc_type, X[b, corners[1][0], corners[1][1], chan])
                        + weight[b, y, x, g, 1, 0, p]
                        * T.Cast(acc_type, X[b, corners[2][0], corners[2][1], chan])
                        + weight[b, y, x, g, 1, 1, p]
                        * T.Cast(acc_type, X[b, corners[3][0], corners[3][1], chan])
                    )
        if center_feature:
            gate = T.sblock_alloc_buffer((n, ho, wo, groups), acc_type)
            for i0, i1, i2, i3 in T.grid(n, ho, wo, groups):
                with T.sblock("gate"):
                    b, y, x, g = T.axis.remap("SSSS", [i0, i1, i2, i3])
                    logit = T.meta_var(
                        T.Cast(acc_type, Mask[b, y, x, mask_start + groups * points + g])
                    )
                    gate[b, y, x, g] = real(1) / (real(1) + exponential(-logit))
            if gather:
                center = T.sblock_alloc_buffer((n, ho, wo, groups, group_channels), spec.dtype)
                for i0, i1, i2, i3, c in T.grid(n, ho, wo, groups, group_channels):
                    with T.sblock("center"):
                        b, y, x, g, ch = T.axis.remap("SSSSS", [i0, i1, i2, i3, c])
                        center[b, y, x, g, ch] = X[b, y, x, g * group_channels + ch]
        for i0, i1, i2, i3, c in T.grid(n, ho, wo, groups, group_channels):
            with T.sblock("store"):
                b, y, x, g, ch = T.axis.remap("SSSSS", [i0, i1, i2, i3, c])
                chan = T.meta_var(g * group_channels + ch)
                if softmax:
                    value = T.meta_var(acc[b, y, x, g, ch] / total[b, y, x, g])
                else:
                    value = T.meta_var(acc[b, y, x, g, ch])
                if center_feature:
                    middle = T.meta_var(center[b, y, x, g, ch] if gather else X[b, y, x, chan])
                    part = T.meta_var(gate[b, y, x, g])
                    Out[b, y, x, chan] = T.Cast(
                        stored, value + part * (T.Cast(acc_type, middle) - value)
                    )
                else:
                    Out[b, y, x, chan] = T.Cast(stored, value)

    return body


def _int32(value: Any) -> Any:
    return tirx.Cast("int32", value)


def _is_one(value: Any) -> bool:
    return isinstance(value, tirx.IntImm) and int(value) == 1
