import pytest
from tvm import tirx

from dcnv3_tvm.kernels.depthwise import depthwise as depthwise_kernel
from dcnv3_tvm.schedules import schedule
from helpers import layers
from helpers.arrays import random_array
from helpers.layers import run_kernel
from helpers.structure import buffer_scopes, loop_kinds


def check(
    rng,
    assert_close,
    target,
    shape,
    given=None,
    kernel=(3, 3),
    stride=(1, 1),
    pad=(1, 1),
    normalized=True,
    activation="gelu",
    row_slack=0,
):
    """Compare the scheduled kernel with float64; `given` are dynamic sizes."""
    *sizes, channels = shape
    x, weight, bias = (
        random_array(rng, *shape),
        random_array(rng, *kernel, channels),
        random_array(rng, channels),
    )
    gamma, beta = random_array(rng, channels), random_array(rng, channels)
    func = depthwise_kernel(
        *(given or sizes),
        channels,
        kernel_size=kernel,
        stride=stride,
        pad=pad,
        bias=True,
        norm_eps=1e-6 if normalized else None,
        activation=activation,
        row_slack=row_slack,
    )
    sums = layers.depthwise(x, weight, stride=stride, pad=pad) + bias
    normal = layers.layer_norm(sums, gamma, beta, 1e-6) if normalized else sums
    arrays = [x, weight, bias, *([gamma, beta] if normalized else [])]
    result = run_kernel(func, arrays, sums.shape, target=target)
    assert_close(result, layers.activation(activation, normal))


@pytest.mark.parametrize(
    "shape", [(1, 14, 28, 64), (2, 7, 7, 80), (1, 5, 13, 16), (1, 3, 1, 13), (1, 1, 6, 24)]
)
def test_sizes(rng, assert_close, host, shape):
    check(rng, assert_close, host, shape)


def test_without_normalization(rng, assert_close, host):
    check(rng, assert_close, host, (1, 7, 9, 32), normalized=False, activation=None)


def test_large_windows_and_strides(rng, assert_close, host):
    check(rng, assert_close, host, (1, 11, 12, 16), kernel=(5, 5), pad=(2, 2))
    check(rng, assert_close, host, (1, 11, 12, 16), kernel=(2, 5), stride=(2, 3), pad=(0, 1))


@pytest.mark.parametrize("shape", [(1, 14, 14, 32), (3, 9, 5, 32)])
def test_dynamic_sizes(rng, assert_close, host, shape):
    n, h, w = (tirx.Var(name, "int64") for name in "nhw")
    check(rng, assert_close, host, shape, given=(n, *shape[1:3]))
    check(rng, assert_close, host, shape, given=(n, h, w))
    check(rng, assert_close, host, shape, given=(n, h, w), row_slack=15)


def test_pixels_beyond_the_last(rng, assert_close, host):
    check(rng, assert_close, host, (2, 3, 19, 24), row_slack=15, stride=(1, 2), kernel=(3, 5))
    check(rng, assert_close, host, (1, 4, 17, 13), row_slack=15, normalized=False)


def test_other_instruction_sets(rng, assert_close, target):
    check(rng, assert_close, target, (1, 6, 7, 48))


def test_sums_stay_in_registers(host):
    func = depthwise_kernel(
        1, 28, 28, 128, kernel_size=(3, 3), pad=(1, 1), bias=True, norm_eps=1e-6, activation="gelu"
    )
    found = schedule(func, host)
    assert found.rule == "depthwise"
    assert {"PARALLEL", "VECTORIZED"} <= loop_kinds(found.function)
    assert "local" in buffer_scopes(found.function)
