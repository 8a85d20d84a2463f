"""What the blocks of a DCNv3 kernel share: the problem, its loop extents and its buffers."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Container, Sequence
from typing import Any, Final

from tvm import tirx

from dcnv3_tvm import gpu
from dcnv3_tvm.op.coordinates import AxisCoordinates
from dcnv3_tvm.op.expr import int64
from dcnv3_tvm.op.math import exp, exp_of_nonpositive
from dcnv3_tvm.op.prim_func_builder import allocate
from dcnv3_tvm.op.sizes import Sizes
from dcnv3_tvm.spec import DCNv3Spec

_INT32_LIMIT: Final = 2**31


@dataclasses.dataclass(frozen=True)
class SamplingKernel:
    """A DCNv3 kernel under construction.

    Parameters
    ----------
    spec : DCNv3Spec
        The problem.
    vector_loads : bool
        The variant, as in `dcnv3_tvm.op.tensorir.dcnv3`.
    mask_start : int
        Channel at which the mask begins in the tensor that holds it.
    center_feature : bool
        Whether the result is blended with x, as in `dcnv3_tvm.op.tensorir.dcnv3_packed`.
    image_dtype : str, optional
        Element type of the tensor of the size of x that is read, or scattered to, at the sampling
        points; by default that of x.
    """

    spec: DCNv3Spec
    vector_loads: bool
    mask_start: int = 0
    center_feature: bool = False
    image_dtype: str | None = None

    @property
    def dtype(self) -> str:
        """Element type of coordinates, weights and sums."""
        return self.spec.accumulate_dtype

    @property
    def vector_channels(self) -> int:
        """Channels of a group at one pixel that one instruction reads, or adds to."""
        dtype = self.image_dtype or self.spec.dtype
        return gpu.vector_elements(self.spec.group_channels, dtype)

    @property
    def index_dtype(self) -> str:
        """Type of the index of a patch: int32 if that can hold every index."""
        spec = self.spec
        largest = (spec.height or _INT32_LIMIT) * (spec.width or _INT32_LIMIT)
        if self.vector_loads:
            largest *= (spec.batch or _INT32_LIMIT) * spec.channels // self.vector_channels
        return "int32" if largest < _INT32_LIMIT else "int64"

    @property
    def group_extents(self) -> tuple[Any, ...]:
        """Extents (N, Ho, Wo, G)."""
        sizes = self.sizes
        return sizes.batch, sizes.out_height, sizes.out_width, int64(self.spec.group)

    @property
    def point_extents(self) -> tuple[Any, ...]:
        """Extents (N, Ho, Wo, G, P)."""
        return *self.group_extents, int64(self.spec.points)

    @property
    def channel_extents(self) -> tuple[Any, ...]:
        """Extents (N, Ho, Wo, G, C'), with C' channels in a group."""
        return *self.group_extents, int64(self.spec.group_channels)

    @property
    def weight_extents(self) -> tuple[Any, ...]:
        """Extents of the weights, in the order of `weight_place`."""
        return self.weight_place(self.point_extents, 2, 2)

    def weight_place(self, point: Sequence[Any], r: Any, s: Any) -> tuple[Any, ...]:
        """Return the place of the weight of corner (r, s) of the point (n, ho, wo, g, p).

        Without vector loads, the weights of all points of a pixel are contiguous, so that they are
        computed in whole vectors.
        """
        n, y, x, g, p = point
        return (n, y, x, g, r, s, p) if self.vector_loads else (n, y, x, r, s, g, p)

    @functools.cached_property
    def sizes(self) -> Sizes:
        """Extents of the problem."""
        return Sizes.of(self.spec)

    @functools.cached_property
    def rows(self) -> AxisCoordinates:
        """Coordinates along the height of the image."""
        return AxisCoordinates(self.spec, 0, self.sizes.height)

    @functools.cached_property
    def columns(self) -> AxisCoordinates:
        """Coordinates along the width of the image."""
        return AxisCoordinates(self.spec, 1, self.sizes.width)

    def exp(self, value: Any) -> Any:
        """Return e**value: the target's function on GPUs, vectorizable arithmetic on CPUs."""
        return tirx.exp(value) if self.vector_loads else exp(value)

    def exp_of_nonpositive(self, value: Any) -> Any:
        """Return e**value for a value that is not positive.

        On GPUs ``exp2`` is one instruction. The rounding of its argument makes the relative error
        grow with the value, where the result becomes small.
        """
        if not self.vector_loads:
            return exp_of_nonpositive(value)
        if self.dtype == "float64":
            return tirx.exp(value)
        return tirx.exp2(value * self.constant(math.log2(math.e)))

    def constant(self, value: float) -> Any:
        """Return a constant of the accumulation type."""
        return tirx.const(value, self.dtype)

    def cast(self, value: Any) -> Any:
        """Convert a value to the accumulation type."""
        return tirx.Cast(self.dtype, value)

    def offset_at(self, offset: Any, point: Sequence[Any], axis: Any) -> Any:
        """Read the offset of the point (n, ho, wo, g, p): along x (axis 0) or y (axis 1)."""
        n, y, x, g, p = point
        return offset[n, y, x, (g * int64(self.spec.points) + p) * int64(2) + axis]

    def mask_at(self, mask: Any, point: Sequence[Any]) -> Any:
        """Read the mask, or its logit, of the point (n, ho, wo, g, p)."""
        n, y, x, g, p = point
        return self.cast(mask[n, y, x, self.mask_start + g * int64(self.spec.points) + p])

    def channel(self, group: Any, index: Any) -> Any:
        """Return the channel of x for a channel `index` of a group."""
        return group * int64(self.spec.group_channels) + index


@dataclasses.dataclass(frozen=True)
class Buffers:
    """Intermediate buffers of a kernel; schedules shrink them to what a pixel or point needs.

    All but `patch` and `center`, which hold elements of x, and `index` have the accumulation type.

    Parameters
    ----------
    offset : (N, Ho, Wo, 2, G, P)
        Without vector loads: all offsets along x, then along y.
    position_y, position_x : (N, Ho, Wo, G, P)
        Sampling positions, relative to the anchor.
    row, column : (N, Ho, Wo, G, P)
        First pixel of the 2x2 patch, relative to the anchor.
    weight : (N, Ho, Wo, G, 2, 2, P), without vector loads (N, Ho, Wo, 2, 2, G, P)
        Bilinear weights times the mask.
    total : (N, Ho, Wo, G, C'), without vector loads (N, Ho, Wo, G, 2, C')
        Weighted sums; without vector loads, of the upper and of the lower pixels.
    index : (N, Ho, Wo, G, P)
        Place of the patch in x.
    patch : (N, Ho, Wo, G, P, 2, 2, C')
        The pixels of the patch, with vector loads.
    max_logit, exp_sum : (N, Ho, Wo, G)
        With softmax: the largest logit, the sum of the exponentials.
    exp_logit : (N, Ho, Wo, G, P)
        With softmax: the exponentials, not yet divided by their sum.
    share : (N, Ho, Wo, G)
        With softmax and without vector loads: the reciprocal of the sum.
    gate : (N, Ho, Wo, G)
        With the center feature: share of x in the result.
    center : (N, Ho, Wo, G, C')
        With the center feature and vector loads: the pixel of x at the output pixel.
    """

    offset: Any
    position_y: Any
    position_x: Any
    row: Any
    column: Any
    weight: Any
    total: Any
    index: Any
    patch: Any
    max_logit: Any
    exp_logit: Any
    exp_sum: Any
    share: Any
    gate: Any
    center: Any

    @classmethod
    def of(cls, kernel: SamplingKernel, without: Container[str] = ()) -> Buffers:
        """Allocate the buffers that a kernel needs; the others are None.

        Parameters
        ----------
        kernel : SamplingKernel
            The kernel.
        without : container of str
            Names of buffers that a gradient of the kernel does not use.
        """
        spec, dtype = kernel.spec, kernel.dtype
        of_group, of_point = kernel.group_extents, kernel.point_extents
        of_channel = kernel.channel_extents

        def buffer(name: str, shape: tuple[Any, ...], dtype: str, needed: bool = True) -> Any:
            return allocate(name, shape, dtype) if needed and name not in without else None

        channels = of_channel[-1]
        scalar = not kernel.vector_loads
        pair = (2,) if scalar else ()
        return cls(
            offset=buffer("offsets", (*of_group[:3], 2, *of_point[3:]), dtype, scalar),
            position_y=buffer("position_y", of_point, dtype),
            position_x=buffer("position_x", of_point, dtype),
            row=buffer("row", of_point, dtype),
            column=buffer("column", of_point, dtype),
            weight=buffer("weight", kernel.weight_extents, dtype),
            total=buffer("total", (*of_group, *pair, channels), dtype),
            index=buffer("index", of_point, kernel.index_dtype),
            patch=buffer("patch", (*of_point, 2, 2, channels), spec.dtype, kernel.vector_loads),
            max_logit=buffer("max_logit", of_group, dtype, spec.softmax),
            exp_logit=buffer("exp_logit", of_point, dtype, spec.softmax),
            exp_sum=buffer("exp_sum", of_group, dtype, spec.softmax),
            share=buffer("share", of_group, dtype, spec.softmax and scalar),
            gate=buffer("gate", of_group, dtype, kernel.center_feature),
            center=buffer(
                "center", of_channel, spec.dtype, kernel.center_feature and kernel.vector_loads
            ),
        )
