"""Convolutions in matrix tiles: with AMX where this processor has it, and without."""

import ml_dtypes
import numpy as np
import pytest
import tvm
from tvm import tirx

from dcnv3_tvm import machine
from dcnv3_tvm.errors import InvalidArgumentError
from dcnv3_tvm.kernels.epilogue import Epilogue
from dcnv3_tvm.kernels.tile_convolution import pack_tile_convolution_weight, tile_convolution
from dcnv3_tvm.schedules import schedule_module
from dcnv3_tvm.targets import resolve_target
from helpers import layers
from helpers.arrays import random_array
from helpers.guarded import GuardedOutput, surrounded

FULL = Epilogue(bias=True, activation="gelu", residual=True)
DOWN = {"kernel_size": (3, 3), "stride": (2, 2), "pad": (1, 1)}


@pytest.fixture(params=["auto", "cpu-x86-64-v3"])
def target(request):
    machine.enable_amx()
    return resolve_target(request.param)


def check(rng, target, sizes, channels, *, shape=None, dtype="float32", **window):
    """Compare a kernel for `shape`, by default `sizes`, with float64."""
    inner, outer = channels
    window = DOWN | window
    x = random_array(rng, *sizes, inner)
    weight = random_array(rng, outer, inner, *window["kernel_size"]).astype(ml_dtypes.bfloat16)
    bias = random_array(rng, outer)
    rounded = x.astype(ml_dtypes.bfloat16).astype(x.dtype)
    exact = layers.convolution(rounded, weight, stride=window["stride"], pad=window["pad"])
    residual = random_array(rng, *exact.shape)
    func = tile_convolution(*(shape or sizes), *channels, **window, epilogue=FULL, out_dtype=dtype)
    module = tvm.IRModule({"main": func.with_attr("global_symbol", "main")})
    module, kernels = schedule_module(module, target)
    assert kernels["main"].rule == "tile_matmul"
    packed = pack_tile_convolution_weight(weight.transpose(0, 2, 3, 1))
    out = GuardedOutput(exact.shape, dtype)
    given = (x, packed, bias, residual)
    tvm.compile(module, target=target)["main"](*map(surrounded, given), out.argument)
    reference = layers.finish(FULL, exact, bias, residual)
    error = np.abs(out.checked().astype("float64") - reference)
    store = 2.0**-8 * np.abs(reference) if dtype == "bfloat16" else 0.0
    assert (error <= store + 1e-5 * np.abs(reference).max()).all()


@pytest.mark.parametrize(
    ("sizes", "channels", "window"),
    [
        # Blocks of two output rows, of one row, of parts of a row, and of copied windows; odd
        # numbers of each.
        ((1, 18, 18), (32, 64), {}),
        ((2, 9, 12), (16, 48), {}),
        ((1, 2, 13), (16, 32), {}),
        ((1, 5, 75), (33, 32), {}),
        ((3, 13, 9), (32, 40), {}),
        ((1, 3, 21), (24, 40), {"kernel_size": (2, 3), "stride": (1, 1), "pad": (0, 2)}),
    ],
)
def test_sizes(rng, target, sizes, channels, window):
    check(rng, target, sizes, channels, **window)


def test_bfloat16_output(rng, target):
    check(rng, target, (1, 6, 10), (32, 32), dtype="bfloat16")


def test_dynamic_sizes(rng, target):
    shape = tuple(tirx.Var(name, "int64") for name in "nhw")
    check(rng, target, (2, 5, 9), (32, 32), shape=shape)
    check(rng, target, (2, 5, 9), (96, 352), shape=shape)


def test_packing(rng):
    weight = random_array(rng, 32, 2, 1, 32).astype(ml_dtypes.bfloat16)
    packed = pack_tile_convolution_weight(weight)
    assert packed.shape == (1, 2, 1, 2, 16, 16, 2)
    # (block, run, step, half, pair, column, element) to (half, column, run, pair, element)
    rows = packed[0, :, 0].transpose(1, 3, 0, 2, 4)
    np.testing.assert_array_equal(rows.reshape(weight.shape), weight)


def test_rejects_narrow_windows():
    with pytest.raises(InvalidArgumentError, match=r"9 elements in a row of the window"):
        tile_convolution(1, 8, 8, 3, 32, **DOWN)
