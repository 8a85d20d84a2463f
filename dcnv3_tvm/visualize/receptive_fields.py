"""Follow an output position back through the sampling points of all blocks before it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from dcnv3_tvm import checks
from dcnv3_tvm.visualize.block_sampling import BlockSampling

Float64Array = npt.NDArray[np.float64]


class ReceptiveField(NamedTuple):
    """How much the pixels of a block's input contribute to one output position of a later block.

    Parameters
    ----------
    block : BlockSampling
        The block whose input it is.
    contribution : numpy.ndarray
        Shape (H, W) of the block's input, float64. The sum is what of the weights fell on pixels;
        the rest fell outside of the maps, on zeros.
    """

    block: BlockSampling
    contribution: Float64Array


def receptive_field(
    blocks: Sequence[BlockSampling], index: int, y: int, x: int, *, group: int | None = None
) -> list[ReceptiveField]:
    """Follow the sampling points of an output position back to the image.

    The weight of a point is shared by the four pixels that the bilinear interpolation reads. Each
    of them is an output position of the block before, whose points share the weight in turn. The
    groups of the blocks before share it equally, because the projections between the blocks mix all
    channels. Between stages, a position is followed to the pixel in the middle of the convolution
    that halves the size. Every contribution is followed; none is cut off.

    It is the field of the deformable paths only: residual connections, the values of projections,
    MLPs and norms, and the convolutions that compute offsets and masks are not in it. So it shows
    where the model looks through DCNv3, not the gradient of an output by the image. Blocks are
    followed in the order in which they ran, as if they were a chain.

    Parameters
    ----------
    blocks : sequence of BlockSampling
        From `capture_sampling`.
    index : int
        The block in `blocks` whose output is followed.
    y, x : int
        Output position of this block.
    group : int, optional
        Follow only this group of the block; by default all, with equal shares.

    Returns
    -------
    list of ReceptiveField
        One for the input of each block from `index` back to 0. The last is on the map that the
        stem makes of the image.

    Raises
    ------
    InvalidArgumentError
        If there is no such block, position or group.
    """
    index = checks.integer("index", index, low=0, high=len(blocks) - 1)
    start = blocks[index]
    start.check_position(y, x)
    if group is not None:
        group = checks.integer("group", group, low=0, high=start.params.group - 1)
    share = np.zeros(start.output_size)
    share[y, x] = 1.0
    fields = []
    for number in range(index, -1, -1):
        block = blocks[number]
        contribution = _spread(block, share, group if number == index else None)
        fields.append(ReceptiveField(block, contribution))
        if number:
            share = _to_output_of(blocks[number - 1], block, contribution)
    return fields


def _spread(block: BlockSampling, share: Float64Array, group: int | None) -> Float64Array:
    """Share what the output positions have among the pixels of the input that they sample."""
    rows, columns = np.nonzero(share)
    groups: Any = slice(None) if group is None else slice(group, group + 1)
    points = block.points[rows, columns][:, groups].astype(np.float64)
    weights = block.weights[rows, columns][:, groups].astype(np.float64)
    weights *= (share[rows, columns] / weights.shape[1])[:, None, None]
    height, width = block.size
    # A point outside is moved to where it reads no pixel.
    inside = block.inside[rows, columns][:, groups]
    x, y = (np.where(inside, points[..., axis], -1.0) for axis in (0, 1))
    top, left = np.floor(y).astype(np.int64), np.floor(x).astype(np.int64)
    contribution = np.zeros(height * width)
    for row, weight_y in ((top, top + 1 - y), (top + 1, y - top)):
        for column, weight_x in ((left, left + 1 - x), (left + 1, x - left)):
            used = inside & (row >= 0) & (row < height) & (column >= 0) & (column < width)
            contribution += np.bincount(
                (row * width + column)[used],
                weights=(weights * weight_y * weight_x)[used],
                minlength=height * width,
            )
    return contribution.reshape(height, width)


def _to_output_of(
    earlier: BlockSampling, later: BlockSampling, contribution: Float64Array
) -> Float64Array:
    """Follow pixels of a block's input to the output positions of the block before it."""
    if earlier.output_size == later.size:
        return contribution
    indices = []
    for axis in (0, 1):
        ratio = later.stride[axis] / earlier.output_stride[axis]
        # Of two that are as near the first, as in upsampling to the nearest.
        nearest = np.ceil(np.arange(later.size[axis]) * ratio - 0.5).astype(np.int64)
        indices.append(np.minimum(nearest, earlier.output_size[axis] - 1))
    rows, columns = indices
    share = np.zeros(earlier.output_size)
    np.add.at(share, (rows[:, None], columns[None, :]), contribution)
    return share
