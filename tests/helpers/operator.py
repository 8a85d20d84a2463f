"""Runs compiled DCNv3 kernels on arrays, and holds what comes out against the reference."""

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
    """Return what a kernel of `dcnv3_tvm.op.tensorir` takes before its output.

    Parameters
    ----------
    spec : DCNv3Spec
        The problem, static.
    inputs : Inputs
        Its inputs.
    packed : bool
        Whether the kernel takes offsets and logits in one tensor.
    gate : numpy.ndarray, optional
        Logits (N, Ho, Wo, group) of a packed kernel that blends its result with its input.
    """
    if not packed:
        return [inputs.x, inputs.offset, inputs.mask]
    parts = [inputs.offset, inputs.mask, *([] if gate is None else [gate])]
    used = np.concatenate(parts, axis=-1)
    channels = tensorir.packed_channels(spec, center_feature=gate is not None)
    filling = np.full((*used.shape[:3], channels - used.shape[3]), np.nan, used.dtype)
    return [inputs.x, np.concatenate([used, filling], axis=-1)]


def output_shape(spec: DCNv3Spec, inputs: Inputs) -> tuple[int, ...]:
    """Return the shape of a kernel's output."""
    return (*inputs.offset.shape[:3], spec.channels)


def run(
    kernel: Any, spec: DCNv3Spec, inputs: Inputs, packed: bool = False, gate: Array | None = None
) -> Array:
    """Run a compiled kernel into an output full of NaN; fails if it writes outside.

    Parameters are those of `arguments`.
    """
    out = GuardedOutput(output_shape(spec, inputs), spec.dtype)
    given = arguments(spec, inputs, packed, gate)
    kernel(*(tensors.to_kernel(array) for array in given), out.argument)
    return out.checked()


def check(out: Array, spec: DCNv3Spec, inputs: Inputs, gate: Array | None = None) -> None:
    """Fail where an output is further from the reference than its error bound.

    A blend is held to the bound of what is blended.
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
