"""Where DCNv3 samples without learned offsets, for the forms and for their recognition."""

from __future__ import annotations

import numpy as np

from dcnv3_tvm.frontend.onnx.graph import Array
from dcnv3_tvm.spec import DCNv3Params


def kernel_grid(params: DCNv3Params) -> Array:
    """Return (x, y) of each point relative to the kernel's center, shape (P, 2), in pixels."""
    grid: Array = np.array(params.kernel_points) * params.dilation[::-1] - _half(params)[::-1]
    return grid


def sampling_points(params: DCNv3Params, out_size: tuple[int, int]) -> Array:
    """Return (x, y) of each point of each output pixel, shape (Ho, Wo, P, 2), in pixels."""
    rows, columns = (
        np.arange(extent) * params.stride[axis] - params.pad[axis] + _half(params)[axis]
        for axis, extent in enumerate(out_size)
    )
    centers = np.stack(np.meshgrid(columns, rows, indexing="xy"), -1)[:, :, None]
    points: Array = centers + params.offset_scale * kernel_grid(params)
    return points


def _half(params: DCNv3Params) -> list[int]:
    return [
        dilation * (kernel - 1) // 2
        for dilation, kernel in zip(params.dilation, params.kernel_size, strict=True)
    ]
