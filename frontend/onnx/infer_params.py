"""Infer the parameters of a DCNv3 from the coordinates at which nodes of ONNX sample."""

from __future__ import annotations

import itertools
import math
from typing import Final, NamedTuple

import numpy as np
import onnx_ir as ir

from dcnv3_tvm.errors import InvalidArgumentError
from dcnv3_tvm.frontend.onnx.evaluate import Subgraph
from dcnv3_tvm.frontend.onnx.graph import Array
from dcnv3_tvm.frontend.onnx.sampling_points import sampling_points
from dcnv3_tvm.spec import MAX_KERNEL, DCNv3Params

_CLOSE: Final = 1e-2
"""Error in pixels of a coordinate computed in float32."""


class Inferred(NamedTuple):
    """DCNv3 of offsets that are an affine function of a graph's value.

    Parameters
    ----------
    params : DCNv3Params
        Parameters of the operator.
    scale, shift : ndarray
        ``value * scale + shift`` is its offset; one number for each channel.
    """

    params: DCNv3Params
    scale: Array
    shift: Array


def infer_grid_sample(node: ir.Node, subgraph: Subgraph) -> Inferred | str:
    """Infer the parameters from the sampled coordinates for offsets of zero and one.

    Returns
    -------
    Inferred or str
        The latter says why it is no DCNv3.
    """
    (batch, height, width, _), (_, out_h, out_w, *_) = subgraph.shapes[:2]
    weights = math.prod(subgraph.shapes[2][3:])
    grid = node.inputs[1]
    assert grid is not None
    zero = _with_offset(subgraph, 0.0, grid)
    if zero.shape[0] % batch or weights % (zero.shape[0] // batch):
        return f"its grid has {zero.shape[0]} images for a batch of {batch}"
    group = zero.shape[0] // batch
    points = weights // group
    if zero.shape[1:] != (out_h * out_w, points, 2):
        return f"its grid has shape {zero.shape}, not (N*group, Ho*Wo, points, 2)"
    extent = np.array(_sampled_size(node, subgraph))
    # In pixels of x, without the padding that some exporters put around it.
    start = ((zero[0].astype("float64") + 1) * extent - 1) / 2 - (extent - (width, height)) / 2
    start = start.reshape(out_h, out_w, points, 2)
    moved = (_with_offset(subgraph, 1.0, grid)[0].astype("float64") - zero[0]) * extent / 2
    scale = np.array([_rounded(value) for value in np.median(moved, axis=(0, 1))])
    if not scale.all() or np.abs(moved - scale).max() > _CLOSE * max(1.0, np.abs(scale).max()):
        return "its coordinates are not the offsets times a factor, plus a constant"
    # As it was written: with the factor for offset_scale. Otherwise factors and displacements of
    # the points are folded into the offsets, so that any kernel with as many points will do.
    for factor, displaced in ((scale[0], False), (1.0, False), (1.0, True)):
        for kernel_h, kernel_w, remove_center in _kernels(points):
            params = _match(start, factor, group, (kernel_h, kernel_w), remove_center)
            if params is None or not _same_size(params, (height, width), (out_h, out_w)):
                continue
            rest = start - sampling_points(params, (out_h, out_w))
            shift = rest[0, 0] if displaced else np.zeros_like(rest[0, 0])
            if np.abs(rest - shift).max() <= _CLOSE * max(1.0, abs(factor)):
                scales = np.tile(scale / factor, group * points)
                return Inferred(params, scales, np.tile(shift.reshape(-1), group))
    return "its coordinates are not those of a DCNv3"


def _same_size(params: DCNv3Params, size: tuple[int, int], out: tuple[int, int]) -> bool:
    return tuple(params.output_extent(extent, axis) for axis, extent in enumerate(size)) == out


def _match(
    start: Array, scale: float, group: int, kernel: tuple[int, int], remove_center: bool
) -> DCNv3Params | None:
    """Find the parameters for which points without offset are about at `start` (Ho, Wo, P, xy)."""
    try:
        points = DCNv3Params(group=1, kernel_size=kernel, remove_center=remove_center).kernel_points
    except InvalidArgumentError:
        return None
    steps = np.array(points)  # (column, row)
    dilation, stride, pad = [1, 1], [1, 1], [0, 0]  # (height, width)
    for axis, extent in enumerate(start.shape[:2]):
        xy = 1 - axis
        at = start[0, 0, :, xy]
        spread = int(np.ptp(steps[:, xy]))
        if spread:
            dilation[axis] = max(round(float(np.ptp(at)) / abs(scale) / spread), 1)
        if extent > 1:
            stride[axis] = round(float(np.take(start, 1, axis)[0, 0, xy] - at[0]))
        half = dilation[axis] * (kernel[axis] - 1) // 2
        center = at - scale * (steps[:, xy] * dilation[axis] - half)
        pad[axis] = round(float(half - np.median(center)))
    try:
        return DCNv3Params(
            group=group,
            kernel_size=kernel,
            stride=stride,
            pad=pad,
            dilation=dilation,
            offset_scale=scale,
            remove_center=remove_center,
        )
    except InvalidArgumentError:
        return None


def _kernels(points: int) -> list[tuple[int, int, bool]]:
    """List the kernels with a number of points, square ones first."""
    found = [
        (height, width, remove_center)
        for remove_center in (False, True)
        for height, width in itertools.product(range(1, MAX_KERNEL + 1), repeat=2)
        if height * width - remove_center == points
    ]
    return sorted(found, key=lambda kernel: abs(kernel[0] - kernel[1]))


def _with_offset(subgraph: Subgraph, value: float, output: ir.Value) -> Array:
    x, offset, mask = subgraph.shapes
    arrays = (np.zeros(x), np.full(offset, value), np.zeros(mask))
    return subgraph.run([array.astype("float32") for array in arrays], output)


def _sampled_size(node: ir.Node, subgraph: Subgraph) -> tuple[int, int]:
    """Return (width, height) of the image that is sampled, with its padding."""
    image = node.inputs[0]
    assert image is not None
    shape = _with_offset(subgraph, 0.0, image).shape
    return shape[3], shape[2]


def _rounded(value: float) -> float:
    """Drop the digits that float32 does not have."""
    return float(f"{value:.5g}")
