"""Rooflines of a model's kernels, from their definitions."""

from __future__ import annotations

import math

from dcnv3_tvm.bench.roofline import Peaks, Roofline
from dcnv3_tvm.compiler.kernel_listing import Kernel
from dcnv3_tvm.compiler.kernel_work import MATMUL_KINDS, flops_per_output
from dcnv3_tvm.dtypes import DTYPE_BYTES


def kernel_roofline(kernel: Kernel, peaks: Peaks) -> Roofline:
    """Return the roofline of one call of a kernel."""
    # Everything but matmuls computes in float32, whatever the dtype of its arguments.
    dtype = kernel.inputs[1].dtype if kernel.kind in MATMUL_KINDS else "float32"
    return Roofline.of(kernel_flops(kernel), kernel_bytes(kernel), peaks, dtype)


def kernel_bytes(kernel: Kernel) -> int:
    """Return the bytes of a kernel's inputs, weights and outputs."""
    arguments = (*kernel.inputs, *kernel.outputs)
    return sum(math.prod(shape) * DTYPE_BYTES[dtype] for shape, dtype in arguments)


def kernel_flops(kernel: Kernel) -> int:
    """Count the multiplications and additions of one call of a kernel, without padding."""
    return round(math.prod(kernel.outputs[0].shape) * flops_per_output(kernel))
