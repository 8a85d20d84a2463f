"""Gradients of DCNv3 in float64 NumPy: the reference for every gradient kernel.

With ``dot[r, s] = sum over c of grad[g, c] * x[n, row r, column s, g, c]`` over the channels of a
group, for the four pixels (r, s) of a sampling point p (`dcnv3_tvm.op.reference` has the notation),

    grad_x[n, row r, column s, g, c] += mask[p] * weight_y[r] * weight_x[s] * grad[g, c]
    grad_mask[p]     = sum over r, s of weight_y[r] * weight_x[s] * dot[r, s]
    grad_offset_x[p] = offset_scale * mask[p] * sum of weight_y[r] * slope_x[s] * dot[r, s]
    grad_offset_y[p] = offset_scale * mask[p] * sum of slope_y[r] * weight_x[s] * dot[r, s]

where slope is the derivative of a bilinear weight by the position: -1 for the first pixel along an
axis and 1 for the second. With softmax, the gradient of the logits is

    grad_logit[p] = mask[p] * (grad_mask[p] - sum over q of mask[q] * grad_mask[q])

Bilinear sampling has kinks at integer positions. As in the published CUDA kernel, the gradient of
the offset there is the one to the right: the pixels are ``floor(position)`` and the next one. A
point outside ``-1 < position < size`` along either axis has no gradient, at exactly -1 neither.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from dcnv3_tvm.op.reference import Array, Float64Array, mask_weights, sampling_corners
from dcnv3_tvm.spec import DCNv3Spec


class Gradients(NamedTuple):
    """Gradients of the arguments of DCNv3, each of the shape of its argument."""

    x: Float64Array
    offset: Float64Array
    mask: Float64Array


def dcnv3_gradients(
    grad: Array, x: Array, offset: Array, mask: Array, spec: DCNv3Spec
) -> Gradients:
    """Compute the gradients of x, offset and mask.

    Parameters
    ----------
    grad : numpy.ndarray
        Gradient of the result, of shape (N, Ho, Wo, G*C').
    x, offset, mask, spec
        As for `dcnv3_tvm.op.reference.dcnv3_loops`.

    Returns
    -------
    Gradients
        float64. With ``spec.softmax``, the gradient of mask is that of the logits.
    """
    masks = mask_weights(mask, spec)
    grouped = (spec.group, spec.group_channels)
    images = x.astype(np.float64).reshape(*x.shape[:3], *grouped)
    grads = grad.astype(np.float64).reshape(*grad.shape[:3], *grouped)
    grad_x, grad_mask = np.zeros_like(images), np.zeros_like(masks)
    grad_offset = np.zeros((*masks.shape, 2))
    for p, corner in sampling_corners(x.shape, offset, spec):
        factor = np.where(corner.used, masks[..., p] * corner.weight_y * corner.weight_x, 0.0)
        np.add.at(grad_x, corner.pixel, factor[..., None] * grads)
        dot = np.where(corner.used, (grads * images[corner.pixel]).sum(axis=-1), 0.0)
        grad_mask[..., p] += corner.weight_y * corner.weight_x * dot
        scaled = spec.offset_scale * masks[..., p] * dot
        grad_offset[..., p, 0] += corner.weight_y * corner.slope_x * scaled
        grad_offset[..., p, 1] += corner.slope_y * corner.weight_x * scaled
    if spec.softmax:
        grad_mask = masks * (grad_mask - (masks * grad_mask).sum(axis=-1, keepdims=True))
    return Gradients(
        grad_x.reshape(x.shape), grad_offset.reshape(offset.shape), grad_mask.reshape(mask.shape)
    )
