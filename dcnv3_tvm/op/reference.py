"""DCNv3 in float64 NumPy, from the formula: what every other implementation is compared with.

`dcnv3_loops` is written to be read beside the formula; `dcnv3_reference` computes the same with
arrays. Neither knows the other, so that each tests the other.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from dcnv3_tvm.spec import DCNv3Spec

Array = npt.NDArray[Any]
Float64Array = npt.NDArray[np.float64]


def dcnv3_loops(x: Array, offset: Array, mask: Array, spec: DCNv3Spec) -> Float64Array:
    """Compute DCNv3 one sample at a time. Slow: for small problems and for reading.

    Parameters
    ----------
    x : numpy.ndarray
        Shape (N, H, W, group*group_channels), any float dtype.
    offset : numpy.ndarray
        Shape (N, Ho, Wo, group*P*2), x before y, in pixels before ``offset_scale``.
    mask : numpy.ndarray
        Shape (N, Ho, Wo, group*P); logits with ``spec.softmax``.
    spec : DCNv3Spec
        The problem. Its sizes may be symbolic; those of the arrays count.

    Returns
    -------
    numpy.ndarray
        float64, shape (N, Ho, Wo, group*group_channels).
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
    """Compute DCNv3 in float64 with arrays.

    Parameters
    ----------
    x, offset, mask, spec
        As for `dcnv3_loops`.

    Returns
    -------
    numpy.ndarray
        float64, shape (N, Ho, Wo, group*group_channels).
    """
    batch, height, width, _ = x.shape
    _, out_height, out_width, _ = offset.shape
    group, points = spec.group, spec.points
    per_point = (batch, out_height, out_width, group, points)

    masks = mask.astype(np.float64).reshape(per_point)
    if spec.softmax:
        masks = np.exp(masks - masks.max(axis=-1, keepdims=True))
        masks = masks / masks.sum(axis=-1, keepdims=True)
    learned = offset.astype(np.float64).reshape(*per_point, 2)
    columns, rows = np.array(spec.kernel_points, dtype=np.float64).T
    pos_y = _positions(spec, 0, out_height, rows)[:, None, None, :] + (
        spec.offset_scale * learned[..., 1]
    )
    pos_x = _positions(spec, 1, out_width, columns)[None, :, None, :] + (
        spec.offset_scale * learned[..., 0]
    )
    # NaN compares false, and so drops the point like one outside.
    inside = (pos_y > -1) & (pos_y < height) & (pos_x > -1) & (pos_x < width)
    pos_y, pos_x = np.where(inside, pos_y, 0.0), np.where(inside, pos_x, 0.0)
    top, left = np.floor(pos_y).astype(np.int64), np.floor(pos_x).astype(np.int64)

    images = x.astype(np.float64).reshape(batch, height, width, group, spec.group_channels)
    batch_index = np.arange(batch).reshape(-1, 1, 1, 1)
    group_index = np.arange(group).reshape(1, 1, 1, -1)
    out = np.zeros((batch, out_height, out_width, group, spec.group_channels))
    # One point at a time bounds the memory.
    for p in range(points):
        for below in (0, 1):
            for right in (0, 1):
                row, col = top[..., p] + below, left[..., p] + right
                weight = np.abs(1 - below - (pos_y - top)[..., p]) * np.abs(
                    1 - right - (pos_x - left)[..., p]
                )
                used = inside[..., p] & (row >= 0) & (row < height) & (col >= 0) & (col < width)
                pixel = images[
                    batch_index,
                    np.where(used, row, 0),
                    np.where(used, col, 0),
                    group_index,
                ]
                factor = np.where(used, weight * masks[..., p], 0.0)[..., None]
                out += np.where(used[..., None], factor * pixel, 0.0)
    return out.reshape(batch, out_height, out_width, spec.channels)


def _positions(spec: DCNv3Spec, axis: int, size: int, grid: Float64Array) -> Float64Array:
    """Place the undeformed points: shape (size, P), along one axis (0: y, 1: x)."""
    half = (spec.dilation[axis] * (spec.kernel_size[axis] - 1)) >> 1
    start = half - spec.pad[axis] + np.arange(size, dtype=np.float64) * spec.stride[axis]
    scaled: Float64Array = spec.offset_scale * (grid * spec.dilation[axis] - half)
    return start[:, None] + scaled[None, :]
