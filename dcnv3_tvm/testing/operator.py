"""Runs compiled DCNv3 kernels on arrays, and holds what comes out against the reference."""

from __future__ import annotations

from typing import Any

import numpy as np

from dcnv3_tvm.op import tensorir, tensors
from dcnv3_tvm.op.reference import Array, dcnv3_reference
from dcnv3_tvm.spec import DCNv3Spec
from dcnv3_tvm.testing.guarded import GuardedOutput
from dcnv3_tvm.testing.specs import Inputs
from dcnv3_tvm.testing.tolerances import operator_bound


def run(kernel: Any, spec: DCNv3Spec, inputs: Inputs, packed: bool = False) -> Array:
    """Run a kernel into an output full of NaN; fails if it writes outside.

    Parameters
    ----------
    kernel : callable
        A compiled kernel of `dcnv3_tvm.op.tensorir`.
    spec : DCNv3Spec
        The problem, static.
    inputs : Inputs
        Its inputs.
    packed : bool
        Whether the kernel takes offsets and logits in one tensor.
    """
    arguments = [inputs.x, inputs.offset, inputs.mask]
    if packed:
        both = np.concatenate([inputs.offset, inputs.mask], axis=-1)
        filling = np.full(
            (*both.shape[:3], tensorir.packed_channels(spec) - both.shape[3]), np.nan, both.dtype
        )
        arguments = [inputs.x, np.concatenate([both, filling], axis=-1)]
    batch, out_height, out_width = inputs.offset.shape[:3]
    out = GuardedOutput((batch, out_height, out_width, spec.channels), spec.dtype)
    kernel(*(tensors.to_kernel("numpy", array) for array in arguments), out.argument)
    return out.checked()


def check(out: Array, spec: DCNv3Spec, inputs: Inputs) -> None:
    """Fail where an output is further from the reference than its error bound."""
    reference = dcnv3_reference(inputs.x, inputs.offset, inputs.mask, spec)
    finite = np.nan_to_num(inputs.offset.astype(np.float64), posinf=1e9, neginf=-1e9)
    bound = operator_bound(spec, inputs.x, finite, inputs.mask, reference)
    error = np.abs(out.astype(np.float64) - reference)
    worst = np.unravel_index(np.argmax(error / bound), error.shape)
    assert np.all(error <= bound), (
        f"{spec.slug}: {out[worst]} is not {reference[worst]} at {worst} "
        f"(error {error[worst]:.3g}, bound {bound[worst]:.3g})"
    )
