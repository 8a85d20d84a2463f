"""GPU schedules of all kernels of released variants, compared with the unscheduled kernels.

Channels and groups are the variants' own, so tiles leave the same remainders. Images are small,
because the GPU is emulated.
"""

import math

import numpy as np
import pytest
import tvm

from dcnv3_tvm.schedules import schedule_module
from dcnv3_tvm.targets import resolve_target
from dcnv3_tvm.verify.tolerances import LAYER
from helpers.guarded import GuardedOutput
from helpers.relax_vm import compile_library
from helpers.variant_kernels import variant_kernels

TARGET = resolve_target("cuda-sm90")
SIZE = (36, 52)
SIZE_OF_H = (32, 64)
"""Its head needs even sizes in its third stage."""

MOST_WEIGHTS = 2**20
"""Larger matmuls repeat those of an earlier stage, with more steps of the same tiles."""

SMALL = ("internimage_t", "internimage_s", "internimage_b")
"""The widths of the others are multiples of theirs."""

LARGE = ("internimage_h", "internimage_g")
"""They also have center features, windows of 5x5 and the other head."""

RULES = {"dcnv3_packed": "dcnv3"}
"""Rules by kind of kernel, where the names differ."""


def inputs_of(function, rng):
    """Draw inputs; weights are scaled by the depth of the matmul, their last dimension."""
    arrays = []
    for param in function.params[:-1]:
        shape = [int(size) for size in param.shape]
        array = rng.standard_normal(shape)
        if len(shape) == 2:
            array /= np.sqrt(min(shape))
        arrays.append(array.astype(str(param.dtype)))
    return arrays


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variant", "dtype"),
    [("internimage_t", "float16"), ("internimage_b", "float32"), ("internimage_h", "bfloat16")],
)
def test_scheduled_kernels_compute_the_same(variant, dtype, run_together, rng):
    size = SIZE_OF_H if variant == "internimage_h" else SIZE
    kernels = [
        kernel
        for kernel in variant_kernels(variant, TARGET, dtype, size=size, scheduled=False)
        if kernel.kind and math.prod(kernel.inputs[1].shape) <= MOST_WEIGHTS
    ]
    named = {k.name: k.function.with_attr("global_symbol", k.name) for k in kernels}
    scheduled, _ = schedule_module(tvm.IRModule(named), TARGET)
    expected = compile_library(tvm.IRModule(named))
    problems = {}
    for kernel in kernels:
        out = kernel.function.params[-1]
        shape, kind = tuple(int(size) for size in out.shape), str(out.dtype)
        arrays = inputs_of(kernel.function, rng)
        poisoned = GuardedOutput(shape, kind)
        expected[kernel.name](*map(tvm.runtime.tensor, arrays), poisoned.argument)
        reference = poisoned.checked().astype(np.float64)
        problems[kernel.name] = (scheduled[kernel.name], arrays, (shape, kind), reference)
    for name, result, reference in run_together(TARGET, problems):
        error = np.abs(result.astype(np.float64) - reference).max()
        # Both are rounded to the output's type.
        assert error <= 2 * LAYER[str(result.dtype)] * max(1.0, np.abs(reference).max()), name


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variant", "dtype"),
    [
        *((name, dtype) for name in SMALL for dtype in ("float16", "float32")),
        *((name, "bfloat16") for name in LARGE),
    ],
)
def test_kernels_are_scheduled_by_their_own_rule(variant, dtype):
    kernels = variant_kernels(variant, TARGET, dtype, batch=64)
    assert {"gemm", "depthwise", "layer_norm", "dcnv3_packed"} < {k.kind for k in kernels}
    for kernel in kernels:
        assert kernel.rule == RULES.get(kernel.kind, kernel.kind), kernel.name
