"""Where one DCNv3 samples for one image, and what is computed from it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from dcnv3_tvm import checks
from dcnv3_tvm.errors import InvalidArgumentError
from dcnv3_tvm.op.reference import first_position, mask_weights, sampling_positions
from dcnv3_tvm.spec import DCNv3Params

Float32Array = npt.NDArray[np.float32]

_FARTHEST: Final = 1e15


@dataclasses.dataclass(frozen=True, eq=False)
class BlockSampling:
    """Sampling points and weights of one DCNv3 for one image.

    Positions are pixel centres, counted from 0: position (y, x) of a map with a stride of 4 lies on
    pixel (4*y, 4*x) of the image. That is exact for convolutions with a kernel of 3, padding of 1
    and stride of 2, as those of InternImage. Where the padding of a DCNv3 before is not half of its
    kernel, the map begins elsewhere: at `origin`.

    Parameters
    ----------
    stage : int
        Stage, from 0: consecutive blocks whose inputs have one size.
    block : int
        Block of the stage, from 0.
    params : DCNv3Params
        Parameters of the operator.
    size : (int, int)
        Height and width of the input.
    stride : (float, float)
        Pixels of the image per pixel of the input, along height and width.
    origin : (float, float)
        Pixel (y, x) of the image on which pixel (0, 0) of the input lies.
    points : numpy.ndarray
        Shape (Ho, Wo, group, P, 2), float32: x and y of the sampling points, in pixels of the
        input. They may be outside of it, where the operator samples zeros. NaN stands for places
        that are no numbers, infinite, or beyond 1e15.
    weights : numpy.ndarray
        Shape (Ho, Wo, group, P), float32: weights of the points, after the softmax.
    """

    stage: int
    block: int
    params: DCNv3Params
    size: tuple[int, int]
    stride: tuple[float, float]
    origin: tuple[float, float]
    points: Float32Array
    weights: Float32Array

    @property
    def output_size(self) -> tuple[int, int]:
        """Height and width of the output, whose positions the points belong to."""
        return int(self.points.shape[0]), int(self.points.shape[1])

    @property
    def output_stride(self) -> tuple[float, float]:
        """Pixels of the image per position of the output."""
        return self.stride[0] * self.params.stride[0], self.stride[1] * self.params.stride[1]

    @property
    def output_origin(self) -> tuple[float, float]:
        """Pixel (y, x) of the image on which position (0, 0) of the output lies."""
        y, x = (
            self.origin[axis] + self.stride[axis] * first_position(self.params, axis)
            for axis in (0, 1)
        )
        return y, x

    @property
    def regular_points(self) -> Float32Array:
        """Where the points would be without offsets, as `points`."""
        height, width = self.output_size
        shape = (1, height, width, self.params.offset_channels)
        return _points(np.zeros(shape, np.float32), self.params)

    @property
    def displacement(self) -> Float32Array:
        """How far the points are from the regular grid, (Ho, Wo, group, P, 2), in input pixels."""
        return self.points - self.regular_points

    @property
    def offset_length(self) -> Float32Array:
        """Length of the displacement of each point, (Ho, Wo, group, P), in pixels of the image."""
        lengths: Float32Array = np.linalg.norm(self.displacement * self._xy_stride, axis=-1)
        return lengths

    @property
    def points_in_image(self) -> Float32Array:
        """The points, (Ho, Wo, group, P, 2), in pixels of the image."""
        return self.points * self._xy_stride + np.array(self.origin[::-1], np.float32)

    @property
    def inside(self) -> npt.NDArray[np.bool_]:
        """Whether each point, (Ho, Wo, group, P), reads any pixel of the input."""
        x, y = self.points[..., 0], self.points[..., 1]
        return (y > -1) & (y < self.size[0]) & (x > -1) & (x < self.size[1])

    def position_in_image(self, y: int, x: int) -> tuple[float, float]:
        """Return (y, x) of an output position in pixels of the image.

        Raises
        ------
        InvalidArgumentError
            If there is no such position.
        """
        self.check_position(y, x)
        top, left = self.output_origin
        return top + y * self.output_stride[0], left + x * self.output_stride[1]

    def nearest_position(self, y: float, x: float) -> tuple[int, int]:
        """Return the output position nearest to a pixel (y, x) of the image."""
        nearest = [
            min(max(round((place - origin) / stride), 0), size - 1)
            for place, origin, stride, size in zip(
                (y, x), self.output_origin, self.output_stride, self.output_size, strict=True
            )
        ]
        return nearest[0], nearest[1]

    def check_position(self, y: int, x: int) -> None:
        """Check that an output position exists.

        Raises
        ------
        InvalidArgumentError
            If it does not.
        """
        height, width = self.output_size
        checks.integer("y", y, low=0, high=height - 1)
        checks.integer("x", x, low=0, high=width - 1)

    @property
    def _xy_stride(self) -> Float32Array:
        return np.array(self.stride[::-1], np.float32)


class SampledBlock(NamedTuple):
    """Offset and mask of one DCNv3, as a model computed them.

    Parameters
    ----------
    params : DCNv3Params
        Parameters of the operator.
    size : (int, int)
        Height and width of the input.
    offset, mask : numpy.ndarray
        Arguments of the operator, with a batch of one.
    """

    params: DCNv3Params
    size: tuple[int, int]
    offset: npt.NDArray[Any]
    mask: npt.NDArray[Any]


def number_blocks(
    sampled: Iterable[SampledBlock], image: tuple[int, int]
) -> tuple[BlockSampling, ...]:
    """Return where blocks sample, numbered by stage.

    Parameters
    ----------
    sampled : iterable of SampledBlock
        In the order in which they run.
    image : (int, int)
        Height and width of the image.

    Raises
    ------
    InvalidArgumentError
        If there are none.
    """
    blocks: list[BlockSampling] = []
    # What the maps so far cover of the image: not all of it without padding.
    origin, extent = (0.0, 0.0), (float(image[0]), float(image[1]))
    for params, size, offset, mask in sampled:
        last = blocks[-1] if blocks else None
        same = last is not None and last.size == size
        stage = -1 if last is None else last.stage
        blocks.append(
            BlockSampling(
                stage=stage if same else stage + 1,
                block=last.block + 1 if last is not None and same else 0,
                # The weights are those after the softmax.
                params=dataclasses.replace(params, softmax=False),
                size=size,
                stride=(_stride(extent[0], size[0]), _stride(extent[1], size[1])),
                origin=origin,
                points=_points(offset, params),
                weights=mask_weights(mask, params)[0].astype(np.float32),
            )
        )
        origin = blocks[-1].output_origin
        extent = _extent_after(blocks[-1], extent)
    if not blocks:
        raise InvalidArgumentError(
            "the model has no DCNv3 to look at",
            hint="Models whose DCNv3 `frontend.import_model` finds can be looked at.",
        )
    return tuple(blocks)


def typical_block(blocks: Sequence[BlockSampling]) -> int:
    """Return the index of the deepest block with four positions along each side, or of the first.

    It looks far, and differs from position to position.
    """
    return max((i for i, each in enumerate(blocks) if min(each.output_size) >= 4), default=0)


def _points(offset: npt.NDArray[Any], params: DCNv3Params) -> Float32Array:
    pos_y, pos_x = sampling_positions(offset, params)
    points = np.stack([pos_x[0], pos_y[0]], axis=-1)
    # The operator samples nothing there, and lengths would overflow.
    points[~(np.abs(points) < _FARTHEST)] = np.nan
    return points.astype(np.float32)


def _extent_after(block: BlockSampling, extent: tuple[float, float]) -> tuple[float, float]:
    """Return the pixels of the image that a block's output covers, given those of its input."""
    params = block.params
    height, width = (
        extent[axis]
        + block.stride[axis]
        * (2 * params.pad[axis] - params.dilation[axis] * (params.kernel_size[axis] - 1))
        for axis in (0, 1)
    )
    return height, width


def _stride(extent: float, size: int) -> float:
    """Return the power of two by which a size is smaller, rounded up; otherwise the ratio."""
    stride, left = 1, math.ceil(extent)
    while left > size:
        left, stride = (left + 1) // 2, 2 * stride
    return float(stride) if left == size else extent / size
