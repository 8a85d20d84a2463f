"""The table of tolerances: how far a result may be from float64, and why.

Tests do not define tolerances of their own. Widening one here changes what the library promises.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Final

import numpy as np

from dcnv3_tvm.op.reference import (
    Array,
    Float64Array,
    mask_weights,
    sampling_corners,
    sampling_positions,
)
from dcnv3_tvm.op.reference_gradient import Gradients
from dcnv3_tvm.spec import DCNv3Spec


@dataclasses.dataclass(frozen=True)
class OperatorTolerance:
    """Sources of error of the DCNv3 kernels for one dtype.

    Parameters
    ----------
    arithmetic : float
        Machine epsilon of coordinates, weights and sums.
    store : float
        Unit roundoff of the output type: half its machine epsilon, for one rounding at the store.
    smallest : float
        Half the smallest positive number of the output type.
    """

    arithmetic: float
    store: float
    smallest: float


_ARITHMETIC32: Final = 2.0**-23

OPERATOR: Final = {
    "float64": OperatorTolerance(arithmetic=2.0**-52, store=0.0, smallest=0.0),
    "float32": OperatorTolerance(arithmetic=_ARITHMETIC32, store=0.0, smallest=2.0**-126),
    # 16-bit types: inputs are exact, all arithmetic is in float32.
    "float16": OperatorTolerance(arithmetic=_ARITHMETIC32, store=2.0**-11, smallest=2.0**-25),
    "bfloat16": OperatorTolerance(arithmetic=_ARITHMETIC32, store=2.0**-8, smallest=2.0**-134),
}
"""Sources of error of the operator by dtype, combined by `operator_bound`."""

# Roundings, in epsilons of max|x| * sum|mask|, that do not depend on the position: the bilinear
# weights (a difference and a product of three: 4); four products and sums per point, which for
# random signs grow with the square root of their number (49 points: 7 * 2); the exponential and
# the division of the softmax (3). Doubled.
_ROUNDINGS: Final = 40.0
# A coordinate c has an error of 2 eps*|c| (its sum and its product with offset_scale) and changes
# the value by at most 2 max|x| per pixel along each of two axes: 8 in the worst case.
_COORDINATE_ROUNDINGS: Final = 8.0

LAYER: Final = {
    "float32": 1e-5,
    "float64": 1e-13,
    "float16": 1e-5 + 2.0**-11,
    "bfloat16": 1e-5 + 2.0**-8,
}
"""Single layers by output dtype, relative to max(1, max|reference|): sums of some thousand products
of random signs in another order; in 16-bit types plus one rounding at the store."""

MODEL: Final = {"float32": 1e-4}
"""Whole encoders by dtype, relative to max|reference| of each output: some 60 layers of float32
matmuls in another order, which differ by 1e-6 to 1e-5 between any two libraries."""

MODEL_NORM: Final = {"float16": 2e-3, "bfloat16": 8 * 2e-3}
"""Relative L2 error of whole encoders by matmul dtype. Every layer rounds its operands, on GPUs its
stored result too, with random relative errors of up to 2**-11 in float16 and 2**-8 in bfloat16:
eight times as much. Over some 60 layers, most followed by a residual, they add up to a few times
that. `benchmarks/gpu_accuracy.py` finds 1e-3 to 2e-3 in float16 and 0.6e-2 to 1.5e-2 in bfloat16,
and for eager PyTorch in the same dtype up to 3e-3 and 2.4e-2. The maximum error is not bounded,
because it grows with the number of elements."""

MAX_ERROR: Final = "max"
"""Error measure max|error| / max|reference|."""

NORM_ERROR: Final = "norm"
"""Error measure ||error|| / ||reference||."""


def model_tolerance(dtype: str) -> tuple[str, float]:
    """Return the error measure and the tolerance of a whole encoder compiled for `dtype`.

    Returns
    -------
    measure : str
        `MAX_ERROR` or `NORM_ERROR`.
    bound : float
        Largest error of each output.
    """
    if dtype in MODEL_NORM:
        return NORM_ERROR, MODEL_NORM[dtype]
    return MAX_ERROR, MODEL[dtype]


def operator_bound(
    spec: DCNv3Spec, x: Array, offset: Array, mask: Array, reference: Float64Array
) -> Float64Array:
    """Bound the error of the operator at every output element.

    Parameters
    ----------
    spec : DCNv3Spec
        The problem.
    x, offset, mask : numpy.ndarray
        The inputs, finite.
    reference : numpy.ndarray
        The float64 result, of shape (N, Ho, Wo, C).

    Returns
    -------
    numpy.ndarray
        Shape of `reference`.
    """
    table = OPERATOR[spec.dtype]
    reach = _reach(spec, x, offset)
    if spec.softmax:
        amount = np.ones((*mask.shape[:3], spec.group))
    else:
        per_point = mask.astype(np.float64).reshape(*mask.shape[:3], spec.group, spec.points)
        amount = np.abs(per_point).sum(axis=-1)
    amplitude = float(np.abs(x.astype(np.float64)).max()) * np.repeat(
        amount, spec.group_channels, axis=-1
    )
    arithmetic = table.arithmetic * (_ROUNDINGS + _COORDINATE_ROUNDINGS * reach)
    bound: Float64Array = arithmetic * amplitude + table.store * np.abs(reference) + table.smallest
    return bound


def gradient_bounds(
    spec: DCNv3Spec, grad: Array, x: Array, offset: Array, mask: Array, reference: Gradients
) -> Gradients:
    """Bound the error of the gradients of the operator at every element.

    Parameters
    ----------
    spec : DCNv3Spec
        The problem.
    grad : numpy.ndarray
        Gradient of the result.
    x, offset, mask : numpy.ndarray
        The inputs, finite.
    reference : Gradients
        The float64 gradients.

    Returns
    -------
    Gradients
        Bounds of the shapes of the gradients. Where a point is so near a kink of the bilinear
        sampling that the rounding of its coordinate may move it across, the bound of the gradient
        of its offset is infinite.
    """
    table, sums = OPERATOR[spec.dtype], OPERATOR[spec.accumulate_dtype]
    coordinate = _COORDINATE_ROUNDINGS * _reach(spec, x, offset)
    factors = np.abs(mask_weights(mask, spec))
    grads = np.abs(grad.astype(np.float64)).reshape(*factors.shape[:4], spec.group_channels)

    # The gradient of x: a rounding of each term, whatever its bilinear weight. A coordinate that is
    # rounded across a kink adds a term to another pixel.
    amplitude = np.zeros((*x.shape[:3], spec.group, spec.group_channels))
    for p, corner in sampling_corners(x.shape, offset, spec):
        term = np.where(corner.used, factors[..., p], 0.0)[..., None] * grads
        np.add.at(amplitude, corner.pixel, term)
    term = (_ROUNDINGS + coordinate) * amplitude + coordinate * factors.max() * grads.max()
    bound_x = sums.arithmetic * term.reshape(x.shape) + sums.smallest

    # The other gradients: products over the channels of a group, times weights of at most 1.
    products = np.abs(x.astype(np.float64)).max() * grads.sum(axis=-1)[..., None]
    rounding = table.arithmetic * (_ROUNDINGS + coordinate + spec.group_channels) * products
    by_offset = abs(spec.offset_scale) * factors * rounding * (2 if spec.softmax else 1)
    near = [
        np.abs(position - np.round(position)) <= table.arithmetic * (1 + coordinate)
        for position in sampling_positions(offset, spec)
    ]
    by_offset = np.where(near[0] | near[1], np.inf, by_offset)
    by_mask = 4 * factors * rounding if spec.softmax else np.broadcast_to(rounding, factors.shape)
    bounds = (np.repeat(by_offset, 2, axis=-1).reshape(offset.shape), by_mask.reshape(mask.shape))
    return Gradients(
        bound_x,
        *(
            bound + table.store * np.abs(gradient) + table.smallest
            for bound, gradient in zip(bounds, reference[1:], strict=True)
        ),
    )


def largest_relative(bounds: Iterable[Float64Array], references: Iterable[Float64Array]) -> float:
    """Return the largest bound of several outputs, each relative to its max|reference|."""
    return max(
        float(bound.max() / np.abs(reference).max())
        for bound, reference in zip(bounds, references, strict=True)
    )


def _reach(spec: DCNv3Spec, x: Array, offset: Array) -> float:
    """Return the largest distance of a sampling point from its anchor, in pixels.

    Points farther away than the size of the image lie outside and contribute exactly zero.
    """
    extent = [d * (k - 1) for d, k in zip(spec.dilation, spec.kernel_size, strict=True)]
    learned = float(np.abs(offset.astype(np.float64)).max()) + max(extent)
    outside = max(x.shape[1:3]) + max(extent) + max(spec.pad)
    return float(min(abs(spec.offset_scale) * learned, outside))
