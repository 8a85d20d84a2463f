"""Coordinate arithmetic of DCNv3 sampling, one axis of the image at a time.

Positions are relative to the *anchor* of an output pixel: the pixel of x under the middle of its
undeformed kernel, at ``anchor = out * stride + half - pad`` with
``half = dilation * (kernel_size - 1) >> 1``. Relative positions stay small, so the float32 rounding
error of a sampling position does not grow with the size of the image.

Borders are branchless
----------------------
Bilinear sampling at position s reads pixels ``floor(s)`` and ``floor(s) + 1`` with weights
``1 - f`` and ``f``, where ``f = s - floor(s)``; pixels outside the image count as zero. Here,

- the first pixel read is ``i = floor(clamp(s, 0, size - 2))``, so i and ``i + 1`` are always inside
  the image (in an image of one pixel, both are that pixel, and the second weight is zero);
- the weight of a pixel at distance d from s is the hat function ``max(0, 1 - |d|)``.

If both pixels of the bilinear formula are inside the image, i equals ``floor(s)`` and the hat
function gives the weights ``1 - f`` and ``f``. If only one is inside, the two pixels read are that
border pixel, with its bilinear weight, and its inner neighbor, at a distance of at least 1 and so
with weight zero. If none is inside, both weights are zero. So no border needs a branch, and no
offset reads out of bounds: infinity is clamped like any number, and NaN to the lower end, with
weight zero.

One difference remains: an infinite or NaN pixel near the border of x may reach outputs whose
sampling points lie outside the image, because zero times infinity is NaN.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from tvm import tirx

from dcnv3_tvm.op.expr import int64, static
from dcnv3_tvm.spec import DCNv3Spec


@dataclasses.dataclass(frozen=True)
class AxisCoordinates:
    """Positions, first pixel and weights along one axis of the image.

    Parameters
    ----------
    spec : DCNv3Spec
        The problem.
    axis : int
        0 for rows, 1 for columns.
    size : tvm.tirx.PrimExpr
        Extent of the image along the axis.
    """

    spec: DCNv3Spec
    axis: int
    size: Any

    @property
    def _half(self) -> int:
        """Distance from the first point of the undeformed kernel to its middle."""
        return (self.spec.dilation[self.axis] * (self.spec.kernel_size[self.axis] - 1)) >> 1

    @property
    def step(self) -> Any:
        """Distance from the first to the second pixel of a patch: 0 in an image of one pixel."""
        return tirx.min(self.size - int64(1), int64(1))

    def anchor(self, out: Any) -> Any:
        """Return the pixel of x under the middle of the undeformed kernel at output pixel `out`."""
        return out * int64(self.spec.stride[self.axis]) + int64(
            self._half - self.spec.pad[self.axis]
        )

    def position(self, point: Any, offset: Any) -> Any:
        """Return where a kernel point samples, relative to the anchor.

        ``offset_scale * (grid + offset)``, in the accumulation type.
        """
        dtype = self.spec.accumulate_dtype
        grid = tirx.Cast(dtype, self._grid(point))
        scale = tirx.const(self.spec.offset_scale, dtype)
        return scale * (grid + tirx.Cast(dtype, offset))

    def _grid(self, point: Any) -> Any:
        """Return the place of a point in the undeformed kernel, relative to its middle."""
        spec = self.spec
        if spec.remove_center:
            # Skip the middle point: add 1 from there on. Division rather than a comparison.
            # See tvm_workarounds: constant-comparison.
            point = point + tirx.floordiv(point, spec.points // 2)
        rows = spec.kernel_size[0]
        index = tirx.floormod(point, rows) if self.axis == 0 else tirx.floordiv(point, rows)
        return index * int64(spec.dilation[self.axis]) - int64(self._half)

    def first_pixel(self, position: Any, out: Any) -> Any:
        """Return the first of the two pixels read, relative to the anchor.

        It is inside the image for every position; NaN is clamped to the lower end. The result is an
        integer, but of the accumulation type, in which `weight` uses it.
        """
        low = -self.anchor(out)
        high = low + tirx.max(self.size - int64(2), int64(0))
        # Through int32, because converting int64 to floating point is slow on GPUs.
        low, high = (
            tirx.Cast(self.spec.accumulate_dtype, tirx.Cast("int32", end)) for end in (low, high)
        )
        # In this order, the maximum of NaN and the lower end is that end on CPUs and GPUs.
        return tirx.floor(tirx.min(tirx.max(position, low), high))

    def weight(self, position: Any, first: Any, corner: Any) -> Any:
        """Return the bilinear weight of pixel ``first + corner`` (0 or 1): ``max(0, 1 - |d|)``."""
        dtype = self.spec.accumulate_dtype
        distance = position - first - tirx.Cast(dtype, corner)
        # In this order, the maximum of NaN and zero is zero on CPUs, too.
        weight = tirx.max(tirx.const(1, dtype) - tirx.abs(distance), tirx.const(0, dtype))
        if static(self.step) == 1:
            return weight
        # In an image of one pixel, corner 1 is the same pixel again: its weight is zero.
        return weight * tirx.Cast(dtype, corner * (self.step - int64(1)) + int64(1))

    def slope(self, position: Any, first: Any, corner: int) -> Any:
        """Return the derivative of `weight` by the position, to the right where it has a kink.

        -1 if pixel ``first + corner`` is the one at ``floor(position)``, 1 if it is the next one,
        and 0 otherwise, also where the sampling point is outside the image or NaN.
        """
        dtype = self.spec.accumulate_dtype
        zero, one = tirx.const(0, dtype), tirx.const(1, dtype)
        distance = position - first
        if corner == 0:
            # The first pixel is the next one only beyond the border, where position -1 is outside.
            before = tirx.Select(distance > -one, one, zero)
            return tirx.Select(distance < zero, before, tirx.Select(distance < one, -one, zero))
        after = tirx.Select(distance < tirx.const(2, dtype), -one, zero)
        slope = tirx.Select(distance < one, tirx.Select(distance < zero, zero, one), after)
        # In an image of one pixel, corner 1 is the same pixel again.
        return slope if static(self.step) == 1 else slope * tirx.Cast(dtype, self.step)
