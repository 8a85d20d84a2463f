import math
import re

import numpy as np
import pytest
import tvm
from tvm import tirx
from tvm.ir import IRModule

from dcnv3_tvm.kernels.layer_norm import layer_norm as layer_norm_kernel
from dcnv3_tvm.schedules import schedule, schedule_module
from dcnv3_tvm.targets import resolve_target
from helpers import layers
from helpers.layers import run_kernel
from helpers.structure import called, loop_kinds


def check(rng, assert_close, target, shape, lead=None, scale=1.0, shift=0.0, **options):
    """Compare the scheduled kernel with float64."""
    x = (rng.standard_normal(shape) * scale + shift).astype("float32")
    gamma, beta = (rng.standard_normal(shape[-1]).astype("float32") for _ in range(2))
    residual = rng.standard_normal(shape).astype("float32")
    func = layer_norm_kernel(lead or shape[:-1], shape[-1], eps=1e-6, **options)
    given = [x, gamma, beta, *([residual] if options.get("residual") else [])]
    result = run_kernel(func, given, shape, target=target)
    reference = layers.activation(
        options.get("activation"), layers.layer_norm(x, gamma, beta, 1e-6)
    )
    assert_close(result, reference + residual if options.get("residual") else reference)


@pytest.mark.parametrize("shape", [(1, 14, 14, 64), (49, 512), (13, 17), (1, 1), (1, 768), (3, 24)])
def test_sizes(rng, assert_close, host, shape):
    check(rng, assert_close, host, shape)


def test_activation_and_residual(rng, assert_close, host):
    check(rng, assert_close, host, (28, 80), activation="gelu", residual=True)


def test_large_mean_costs_no_accuracy(rng, host):
    x = (rng.standard_normal((16, 64)) + 4096.0).astype("float32")
    one, zero = np.ones(64, "float32"), np.zeros(64, "float32")
    func = layer_norm_kernel((16,), 64, eps=1e-6)
    result = run_kernel(func, [x, one, zero], x.shape, target=host)
    # The mean is rounded to 2**-11 here; E[x^2] - E[x]^2 would have errors of order 1.
    assert np.abs(result - layers.layer_norm(x, one, zero, 1e-6)).max() < 4096 * 2.0**-22


@pytest.mark.parametrize("shape", [(2, 7, 32), (1, 5, 32)])
def test_dynamic_sizes(rng, assert_close, host, shape):
    n, h = tirx.Var("n", "int64"), tirx.Var("h", "int64")
    check(rng, assert_close, host, shape, lead=(n, shape[1]))
    check(rng, assert_close, host, shape, lead=(n, h))
    check(rng, assert_close, host, shape, lead=(n, h), row_slack=15)


def test_rows_beyond_the_last(rng, assert_close, host):
    check(rng, assert_close, host, (37, 48), activation="gelu", residual=True, row_slack=15)
    func = layer_norm_kernel((tirx.Var("n", "int64"),), 64, eps=1e-6, row_slack=15)
    lines = schedule(func, host).function.script().splitlines()
    # Several rows are summed together, without a guard.
    assert any("T.unroll(T.int64(14))" in line for line in lines)
    assert sum("T.where(" in line for line in lines) == 1


def test_other_instruction_sets(rng, assert_close, target):
    check(rng, assert_close, target, (14, 48))


def test_rows_run_in_parallel_and_channels_in_vectors(host):
    found = schedule(layer_norm_kernel((3136,), 64, eps=1e-6), host)
    assert found.rule == "layer_norm"
    assert {"PARALLEL", "VECTORIZED"} <= loop_kinds(found.function)
    code = tvm.compile(IRModule({"main": found.function}), target=host).mod.inspect_source()
    assert "TVMBackendAllocWorkspace" not in code  # slower than the sums


@pytest.mark.parametrize("channels", [7, 10, 20, 40, 48])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_lane_sums_of_every_width(rng, assert_close, dtype, channels):
    target = resolve_target("cpu-haswell")
    x = rng.standard_normal((9, channels)).astype(dtype)
    gamma, beta = (rng.standard_normal(channels).astype(dtype) for _ in range(2))
    func = layer_norm_kernel((9,), channels, eps=1e-6, dtype=dtype)
    width = math.gcd(channels, 32 // x.itemsize)
    found = schedule(func, target)
    assert found.rule == "layer_norm"
    sums = re.compile(rf"dcnv3_tvm_sum_{dtype}x\d+x{width}")
    assert any(map(sums.fullmatch, called(found.function.body))) == (width > 1)
    result = run_kernel(func, [x, gamma, beta], x.shape, target=target)
    assert_close(result, layers.layer_norm(x, gamma, beta, 1e-6), dtype)


def test_lane_sums_stay_in_vector_registers():
    target = resolve_target("cpu-znver4")
    func = layer_norm_kernel((3136,), 64, eps=1e-6)
    module = tvm.IRModule({"main": func.with_attr("global_symbol", "main")})
    module, _ = schedule_module(module, target)
    assembly = tvm.compile(module, target=target).mod.inspect_source("asm")
    # Moves to general-purpose registers, as halving a vector in memory compiles to.
    assert "vpextrq" not in assembly
    assert "dcnv3_tvm_sum" not in assembly
