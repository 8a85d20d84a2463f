"""Every kernel of released variants by its GPU schedule, on small images, against no schedule.

Channels and groups are the variants' own, and so are the remainders that tiles leave of them; the
images are small, because the GPU is emulated.
"""

import math

import numpy as np
import pytest
import tvm

from dcnv3_tvm import frontend
from dcnv3_tvm.bench.variant_kernels import variant_kernels
from dcnv3_tvm.schedules import schedule, schedule_module
from dcnv3_tvm.targets import resolve_target
from dcnv3_tvm.verify.tolerances import LAYER
from helpers.guarded import GuardedOutput

TARGET = resolve_target("cuda-sm90")
HOST = resolve_target("auto")
SIZE = (36, 68)
MOST_WEIGHTS = 2**23
"""Products of H with more are those of an earlier stage, with more steps of the same tiles."""


def inputs_of(function, rng):
    """Random inputs, scaled by the depth of a product, which is a weight's last dimension."""
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
def test_every_kernel(variant, dtype, run_together, rng):
    kernels = [
        kernel
        for kernel in variant_kernels(variant, TARGET, dtype, size=SIZE)
        if math.prod(int(size) for size in kernel.function.params[1].shape) <= MOST_WEIGHTS
    ]
    named = {k.name: k.function.with_attr("global_symbol", k.name) for k in kernels}
    scheduled, rules = schedule_module(tvm.IRModule(named), TARGET)
    assert {name: found.rule for name, found in rules.items()} == {
        kernel.name: kernel.rule for kernel in kernels
    }
    expected = tvm.compile(tvm.IRModule(named), target=HOST)
    problems = {}
    for kernel in kernels:
        out = kernel.function.params[-1]
        shape, kind = tuple(int(size) for size in out.shape), str(out.dtype)
        arrays = inputs_of(kernel.function, rng)
        poisoned = GuardedOutput(shape, kind)
        expected[kernel.name](*map(tvm.runtime.tensor, arrays), poisoned.argument)
        truth = poisoned.checked().astype(np.float64)
        problems[kernel.name] = (scheduled[kernel.name], arrays, (shape, kind), truth)
    for name, result, truth in run_together(TARGET, problems):
        error = np.abs(result.astype(np.float64) - truth).max()
        # Both are rounded to the output's type.
        assert error <= 2 * LAYER[str(result.dtype)] * max(1.0, np.abs(truth).max()), name


@pytest.mark.parametrize("variant", frontend.list_models("internimage_*"))
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_every_kernel_has_its_rule(variant, dtype):
    for kernel in variant_kernels(variant, TARGET, dtype, batch=64):
        assert schedule(kernel.function, TARGET).rule == kernel.rule, kernel.name
