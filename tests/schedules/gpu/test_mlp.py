"""GPU schedule of the fused MLP kernel."""

import numpy as np
import pytest
import tvm

from dcnv3_tvm.kernels.epilogue import Epilogue
from dcnv3_tvm.schedules.gpu.mlp import mlp
from dcnv3_tvm.schedules.gpu.tensorize import tensorize
from dcnv3_tvm.schedules.rule import Refusal
from dcnv3_tvm.schedules.space import SearchSpace
from dcnv3_tvm.targets import resolve_target
from helpers import layers
from helpers.arrays import random_array
from helpers.gpu_kernels import gemm, pack_gemm_weight
from helpers.gpu_kernels import mlp as mlp_kernel

TARGET = resolve_target("cuda-sm90")
HALF = ("float16", "bfloat16")


def arguments(rng, lead, sizes, residual, dtypes):
    """Return the inputs of a kernel, and the result in float64 of the rounded inputs."""
    dtype, x_dtype, residual_dtype = dtypes
    inputs, hidden, outputs = sizes
    x = random_array(rng, *lead, inputs, dtype=dtype).astype(x_dtype)
    first = random_array(rng, hidden, inputs, dtype=dtype, scale=inputs**-0.5)
    second = random_array(rng, outputs, hidden, dtype=dtype, scale=hidden**-0.5)
    bias1, bias2 = random_array(rng, hidden), random_array(rng, outputs)
    added = [random_array(rng, *lead, outputs, dtype=residual_dtype)] if residual else []
    gelu = Epilogue(bias=True, activation="gelu")
    wide = [array.astype(np.float64) for array in (x, first, second)]
    middle = layers.finish(gelu, wide[0] @ wide[1].T, bias1)
    middle = middle.astype(dtype).astype(np.float64)
    expected = middle @ wide[2].T + bias2 + sum(array.astype(np.float64) for array in added)
    return [x, pack_gemm_weight(first), bias1, pack_gemm_weight(second), bias2, *added], expected


def run(gpu, kernel, inputs, shape, dtype, **decisions):
    scheduled = tensorize(mlp(kernel, TARGET, SearchSpace(decisions)))
    (result,) = gpu.run(scheduled, TARGET, inputs, [(shape, dtype)])
    return result


SIZES = [
    ((128,), (64, 256, 64)),
    ((3, 7, 9), (80, 320, 80)),
    ((1, 1), (128, 512, 128)),
    ((300,), (112, 448, 112)),
    ((2, 5, 31), (40, 32, 24)),
    ((17,), (27, 96, 10)),
]


@pytest.mark.parametrize(("dtype", "given"), [("float16", SIZES), ("bfloat16", SIZES[-2:])])
def test_results(check_together, dtype, given, rng):
    problems = {}
    for number, (lead, sizes) in enumerate(given):
        residual = number % 2 == 1
        kernel = mlp_kernel(lead, *sizes, activation="gelu", residual=residual, dtype=dtype)
        inputs, expected = arguments(rng, lead, sizes, residual, (dtype,) * 3)
        name = "_".join(map(str, ("mlp", *lead, *sizes)))
        scheduled = tensorize(mlp(kernel, TARGET, SearchSpace()))
        problems[name] = (scheduled, inputs, (expected.shape, dtype), expected)
    check_together(TARGET, problems)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("decisions", [{}, {"rows": 1, "stages": 3}], ids=["default", "other"])
def test_float32_input_residual_and_output(gpu, assert_close, dtype, decisions, rng):
    lead, sizes = (50, 3), (64, 128, 48)
    kernel = mlp_kernel(
        lead,
        *sizes,
        activation="gelu",
        residual=True,
        dtype=dtype,
        x_dtype="float32",
        residual_dtype="float32",
        out_dtype="float32",
    )
    inputs, expected = arguments(rng, lead, sizes, True, (dtype, "float32", "float32"))
    result = run(gpu, kernel, inputs, expected.shape, "float32", **decisions)
    # Hidden values may be rounded to the other neighbour in `dtype`.
    assert_close(result, expected, dtype)


def test_dynamic_rows(check_together, rng):
    n = tvm.tirx.Var("n", "int64")
    sizes = (64, 96, 64)
    kernel = mlp_kernel((n, 5), *sizes, activation="gelu", residual=True, dtype="float16")
    scheduled = tensorize(mlp(kernel, TARGET, SearchSpace()))
    problems = {}
    for count in (1, 26, 77):
        inputs, expected = arguments(rng, (count, 5), sizes, True, ("float16",) * 3)
        problems[f"of_{count}"] = (scheduled, inputs, (expected.shape, "float16"), expected)
    check_together(TARGET, problems)


def test_refuses_other_kernels():
    other = gemm((8,), 16, 16, dtype="float16")
    assert mlp(other, TARGET, SearchSpace()) == Refusal("schedules kernel 'mlp'; this is 'gemm'")


def test_hidden_features_must_fill_slabs():
    kernel = mlp_kernel((8,), 16, 48, 16, activation="gelu", residual=False, dtype="float16")
    assert mlp(kernel, TARGET, SearchSpace()) == Refusal(
        "needs a multiple of 32 hidden features; got 48"
    )
