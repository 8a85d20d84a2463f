"""Run compiled DCNv3 kernels on arrays, and compare the results with the reference."""

from __future__ import annotations

from typing import Any

import numpy as np

from dcnv3_tvm.op import tensorir
from dcnv3_tvm.op.reference import Array, dcnv3_reference
from dcnv3_tvm.runtime import tensors
from dcnv3_tvm.spec import DCNv3Spec
from dcnv3_tvm.verify.tolerances import operator_bound
from helpers.guarded import GuardedOutput
from helpers.specs import Inputs


def arguments(
    spec: DCNv3Spec, inputs: Inputs, packed: bool = False, gate: Array | None = None
) -> list[Array]:
    """Return the inputs of a kernel of `dcnv3_tvm.op.tensorir`; padding channels are NaN.

    Parameters
    ----------
    spec : DCNv3Spec
        The problem, static.
    inputs : Inputs
        Its inputs.
    packed : bool
        Whether the kernel is `dcnv3_packed`.
    gate : numpy.ndarray, optional
        Logits of the center feature (N, Ho, Wo, group), for a packed kernel that has it.
    """
    if not packed:
        return [inputs.x, inputs.offset, inputs.mask]
    parts = [inputs.offset, inputs.mask, *([] if gate is None else [gate])]
    used = np.concatenate(parts, axis=-1)
    channels = tensorir.packed_channels(spec, center_feature=gate is not None)
    padding = np.full((*used.shape[:3], channels - used.shape[3]), np.nan, used.dtype)
    return [inputs.x, np.concatenate([used, padding], axis=-1)]


def output_shape(spec: DCNv3Spec, inputs: Inputs) -> tuple[int, ...]:
    """Return the shape of a kernel's output."""
    return (*inputs.offset.shape[:3], spec.channels)


def run(
    kernel: Any, spec: DCNv3Spec, inputs: Inputs, packed: bool = False, gate: Array | None = None
) -> Array:
    """Run a compiled kernel on the `arguments`; fail if it writes outside its output."""
    out = GuardedOutput(output_shape(spec, inputs), spec.dtype)
    given = arguments(spec, inputs, packed, gate)
    kernel(*(tensors.to_kernel(array) for array in given), out.argument)
    return out.checked()


def check(out: Array, spec: DCNv3Spec, inputs: Inputs, gate: Array | None = None) -> None:
    """Assert that a result is within its error bound of the reference.

    With the center feature, the bound is that of the result before the blend.
    """
    reference = dcnv3_reference(inputs.x, inputs.offset, inputs.mask, spec)
    if gate is not None:
        share = 1 / (1 + np.exp(-gate.astype(np.float64)))
        share = np.repeat(share, spec.group_channels, axis=-1)
        reference = reference * (1 - share) + inputs.x.astype(np.float64) * share
    finite = np.nan_to_num(inputs.offset.astype(np.float64), posinf=1e9, neginf=-1e9)
    bound = operator_bound(spec, inputs.x, finite, inputs.mask, reference)
    error = np.abs(out.astype(np.float64) - reference)
    worst = np.unravel_index(np.argmax(error / bound), error.shape)
    assert np.all(error <= bound), (
        f"{spec.slug}: {out[worst]} is not {reference[worst]} at {worst} "
        f"(error {error[worst]:.3g}, bound {bound[worst]:.3g})"
    )
