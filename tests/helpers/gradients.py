"""Compare computed gradients of DCNv3 with the reference."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dcnv3_tvm.op.reference import Array
from dcnv3_tvm.op.reference_gradient import dcnv3_gradients
from dcnv3_tvm.spec import DCNv3Spec
from dcnv3_tvm.verify.tolerances import gradient_bounds
from helpers.specs import Inputs


def result_gradient(spec: DCNv3Spec, inputs: Inputs, seed: int = 9) -> Array:
    """Draw a gradient of the result."""
    shape = (*inputs.offset.shape[:3], spec.channels)
    return np.random.default_rng(seed).standard_normal(shape).astype(inputs.x.dtype)


def check_gradients(results: Sequence[Array], spec: DCNv3Spec, inputs: Inputs, grad: Array) -> None:
    """Assert that the gradients of x, offset and mask are within their error bounds."""
    arrays = grad, inputs.x, inputs.offset, inputs.mask
    reference = dcnv3_gradients(*arrays, spec)
    offset = np.nan_to_num(inputs.offset.astype(np.float64), posinf=1e9, neginf=-1e9)
    bounds = gradient_bounds(spec, grad, inputs.x, offset, inputs.mask, reference)
    for name, result, expected, bound in zip(
        reference._fields, results, reference, bounds, strict=True
    ):
        error = np.abs(result.astype(np.float64) - expected)
        worst = np.unravel_index(np.argmax(error / bound), error.shape)
        assert np.all(error <= bound), (
            f"{spec.slug}: the gradient of {name} is {result[worst]}, not {expected[worst]}, at "
            f"{worst} (error {error[worst]:.3g}, bound {bound[worst]:.3g})"
        )
