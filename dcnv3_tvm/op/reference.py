"""DCNv3 in float64 NumPy: the reference that every other implementation is compared with.

All tensors are channels-last and contiguous. G is the number of groups, C' the channels of a group,
and P the number of kernel points, ``kernel_h * kernel_w - remove_center``.

=========== ================== ===================================================================
tensor      shape              last axis
=========== ================== ===================================================================
``x``       (N, H, W, G*C')    ``g*C' + c``
``offset``  (N, Ho, Wo, G*P*2) ``(g*P + p)*2 + {0: x, 1: y}``, in pixels before ``offset_scale``
``mask``    (N, Ho, Wo, G*P)   ``g*P + p``; logits of a softmax over p with ``spec.softmax``
result      (N, Ho, Wo, G*C')  as ``x``
=========== ================== ===================================================================

Kernel points are numbered column by column: ``p = i*kernel_h + j`` for column i and row j. With
``remove_center``, the middle point is left out and the numbers after it decrease by one. With
``half = dilation*(kernel - 1) >> 1`` along each axis, point p of output pixel (ho, wo) samples x at

    pos_x = wo*stride_w + half_w - pad_w + offset_scale * (i*dilation_w - half_w + offset_x[p])
    pos_y = ho*stride_h + half_h - pad_h + offset_scale * (j*dilation_h - half_h + offset_y[p])

and the result is, for every channel c of group g,

    y[n, ho, wo, g, c] = sum over p of mask[p] * bilinear(x[n, :, :, g, c], pos_y, pos_x)

``bilinear`` takes pixels outside the image as zero, so that padding is virtual and the value fades
to zero within one pixel of the border; a point outside -1 < pos_y < H, -1 < pos_x < W, or at NaN,
contributes nothing. Note that ``offset_scale`` scales the regular grid as well as the learned
offset.

`dcnv3_loops` follows the formula sample by sample; `dcnv3_reference` computes it with arrays. They
share no code, so that each tests the other.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from dcnv3_tvm.spec import DCNv3Params, DCNv3Spec

Array = npt.NDArray[Any]
Float64Array = npt.NDArray[np.float64]


def dcnv3_loops(x: Array, offset: Array, mask: Array, spec: DCNv3Spec) -> Float64Array:
    """Compute DCNv3 sample by sample; slow, for reading and for small problems.

    Parameters
    ----------
    x : numpy.ndarray
        Shape (N, H, W, G*C'), any float dtype.
    offset : numpy.ndarray
        Shape (N, Ho, Wo, G*P*2), x before y, in pixels before ``offset_scale``.
    mask : numpy.ndarray
        Shape (N, Ho, Wo, G*P); logits with ``spec.softmax``.
    spec : DCNv3Spec
        The problem. Sizes are taken from the arrays, so those of the problem may be ``None``.

    Returns
    -------
    numpy.ndarray
        float64, shape (N, Ho, Wo, G*C').
    """
    batch, height, width, _ = x.shape
    out_height, out_width = offset.shape[1:3]
    kernel_h, kernel_w = spec.kernel_size
    half_h = (spec.dilation[0] * (kernel_h - 1)) >> 1
    half_w = (spec.dilation[1] * (kernel_w - 1)) >> 1
    points, channels = spec.points, spec.group_channels
    out = np.zeros((batch, out_height, out_width, spec.channels))

    for n, ho, wo, g in np.ndindex(batch, out_height, out_width, spec.group):
        masks = mask[n, ho, wo, g * points : (g + 1) * points].astype(np.float64)
        if spec.softmax:
            masks = np.exp(masks - masks.max())
            masks = masks / masks.sum()
        chans = slice(g * channels, (g + 1) * channels)
        for p, (i, j) in enumerate(spec.kernel_points):
            learned_x = float(offset[n, ho, wo, (g * points + p) * 2])
            learned_y = float(offset[n, ho, wo, (g * points + p) * 2 + 1])
            pos_x = (
                half_w
                - spec.pad[1]
                + wo * spec.stride[1]
                + spec.offset_scale * ((i * spec.dilation[1] - half_w) + learned_x)
            )
            pos_y = (
                half_h
                - spec.pad[0]
                + ho * spec.stride[0]
                + spec.offset_scale * ((j * spec.dilation[0] - half_h) + learned_y)
            )
            if not (-1 < pos_y < height and -1 < pos_x < width):
                continue
            top, left = math.floor(pos_y), math.floor(pos_x)
            for row, weight_y in ((top, top + 1 - pos_y), (top + 1, pos_y - top)):
                for col, weight_x in ((left, left + 1 - pos_x), (left + 1, pos_x - left)):
                    if 0 <= row < height and 0 <= col < width:
                        pixel = x[n, row, col, chans].astype(np.float64)
                        out[n, ho, wo, chans] += masks[p] * weight_y * weight_x * pixel
    return out


def dcnv3_reference(x: Array, offset: Array, mask: Array, spec: DCNv3Spec) -> Float64Array:
    """Compute DCNv3 with array operations.

    Parameters
    ----------
    x, offset, mask, spec
        As for `dcnv3_loops`.

    Returns
    -------
    numpy.ndarray
        float64, shape (N, Ho, Wo, G*C').
    """
    masks = mask_weights(mask, spec)
    images = x.astype(np.float64).reshape(*x.shape[:3], spec.group, spec.group_channels)
    out = np.zeros((*offset.shape[:3], spec.group, spec.group_channels))
    for p, corner in sampling_corners(x.shape, offset, spec):
        factor = (corner.weight_y * corner.weight_x * masks[..., p])[..., None]
        used = corner.used[..., None]
        out += np.where(used, factor * images[corner.pixel], 0.0)
    return out.reshape(*offset.shape[:3], spec.channels)


class Corner(NamedTuple):
    """One of the four pixels of a sampling point, at each (n, ho, wo, g).

    Parameters
    ----------
    pixel : tuple of numpy.ndarray
        Indices (n, row, column, g) of the pixel; of any pixel where it is not used.
    used : numpy.ndarray
        Whether the pixel contributes: it and the sampling point are inside the image.
    weight_y, weight_x : numpy.ndarray
        Bilinear weights along both axes; of any value where the pixel is not used.
    slope_y, slope_x : int
        Derivatives of the weights by the position: -1 for the first pixel of an axis, 1 for the
        second.
    """

    pixel: tuple[Any, ...]
    used: Array
    weight_y: Float64Array
    weight_x: Float64Array
    slope_y: int
    slope_x: int


def sampling_corners(
    shape: Sequence[int], offset: Array, spec: DCNv3Spec
) -> Iterator[tuple[int, Corner]]:
    """Yield the pixels that DCNv3 reads: four for each kernel point.

    Parameters
    ----------
    shape : sequence of int
        Shape of x.
    offset, spec
        As for `dcnv3_loops`.

    Yields
    ------
    point : int
        Kernel point.
    corner : Corner
        One at a time, to bound the memory.
    """
    batch, height, width, _ = shape
    pos_y, pos_x = sampling_positions(offset, spec)
    # A comparison with NaN is false: the point counts as outside.
    inside = (pos_y > -1) & (pos_y < height) & (pos_x > -1) & (pos_x < width)
    pos_y, pos_x = np.where(inside, pos_y, 0.0), np.where(inside, pos_x, 0.0)
    top, left = np.floor(pos_y).astype(np.int64), np.floor(pos_x).astype(np.int64)
    batch_index = np.arange(batch).reshape(-1, 1, 1, 1)
    group_index = np.arange(spec.group).reshape(1, 1, 1, -1)
    for p, r, s in itertools.product(range(spec.points), (0, 1), (0, 1)):
        row, col = top[..., p] + r, left[..., p] + s
        used = inside[..., p] & (row >= 0) & (row < height) & (col >= 0) & (col < width)
        pixel = (batch_index, np.where(used, row, 0), np.where(used, col, 0), group_index)
        weight_y = np.abs(1 - r - (pos_y - top)[..., p])
        weight_x = np.abs(1 - s - (pos_x - left)[..., p])
        yield p, Corner(pixel, used, weight_y, weight_x, 2 * r - 1, 2 * s - 1)


def sampling_positions(offset: Array, spec: DCNv3Params) -> tuple[Float64Array, Float64Array]:
    """Return where the points sample x, along height and width; both (N, Ho, Wo, G, P)."""
    _, out_height, out_width, _ = offset.shape
    learned = offset.astype(np.float64).reshape(*offset.shape[:3], spec.group, spec.points, 2)
    columns, rows = np.array(spec.kernel_points, dtype=np.float64).T
    pos_y = _positions(spec, 0, out_height, rows)[:, None, None, :] + (
        spec.offset_scale * learned[..., 1]
    )
    pos_x = _positions(spec, 1, out_width, columns)[None, :, None, :] + (
        spec.offset_scale * learned[..., 0]
    )
    return pos_y, pos_x


def first_position(spec: DCNv3Params, axis: int) -> int:
    """Return where the kernel of the first output has its middle, along an axis of x.

    It is half of the kernel, rounded down, less the padding.
    """
    return _half(spec, axis) - spec.pad[axis]


def _half(spec: DCNv3Params, axis: int) -> int:
    return (spec.dilation[axis] * (spec.kernel_size[axis] - 1)) >> 1


def mask_weights(mask: Array, spec: DCNv3Params) -> Float64Array:
    """Return the weights of the points, of shape (N, Ho, Wo, G, P), after a softmax of logits."""
    masks = mask.astype(np.float64).reshape(*mask.shape[:3], spec.group, spec.points)
    if spec.softmax:
        masks = np.exp(masks - masks.max(axis=-1, keepdims=True))
        masks = masks / masks.sum(axis=-1, keepdims=True)
    return masks


def _positions(spec: DCNv3Params, axis: int, size: int, grid: Float64Array) -> Float64Array:
    """Return where the undeformed points sample, along one axis (0: y, 1: x): shape (size, P)."""
    half = _half(spec, axis)
    start = first_position(spec, axis) + np.arange(size, dtype=np.float64) * spec.stride[axis]
    scaled: Float64Array = spec.offset_scale * (grid * spec.dilation[axis] - half)
    return start[:, None] + scaled[None, :]
