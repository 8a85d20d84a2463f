import pytest
from tvm import tirx

from dcnv3_tvm.kernels.convolution import convolution, output_size
from dcnv3_tvm.kernels.epilogue import Epilogue
from dcnv3_tvm.kernels.packing import pack_convolution_weight
from dcnv3_tvm.op.expr import int64
from dcnv3_tvm.schedules import row_slack, schedule, weight_tile_width
from helpers import layers
from helpers.arrays import random_array
from helpers.layers import run_kernel
from helpers.structure import block_body, buffer_scopes, called, loop_kinds


def check(
    rng,
    assert_close,
    target,
    sizes,
    channels,
    given=None,
    kernel=(3, 3),
    stride=(2, 2),
    pad=(1, 1),
    epilogue=None,
):
    """Compare the scheduled kernel at `sizes` with float64; `given` are dynamic sizes."""
    epilogue = epilogue or Epilogue(bias=True)
    inputs, outputs = channels
    tile = weight_tile_width(outputs, target)
    x = random_array(rng, *sizes, inputs)
    weight = random_array(rng, outputs, inputs, *kernel) / (inputs * 9) ** 0.5
    bias = random_array(rng, outputs)
    where = {"stride": stride, "pad": pad}
    size = tuple(map(int64, (given or sizes)[1:3]))
    slack = row_slack(output_size(size, kernel, **where)[1])
    func = convolution(
        *(given or sizes),
        *channels,
        kernel_size=kernel,
        tile=tile,
        row_slack=slack,
        epilogue=epilogue,
        **where,
    )
    sums = layers.convolution(x, weight, **where)
    residual = random_array(rng, *sums.shape)
    arrays = [x, pack_convolution_weight(weight, tile)]
    arrays += [bias] if epilogue.bias else []
    arrays += [residual] if epilogue.residual else []
    result = run_kernel(func, arrays, sums.shape, target=target)
    assert_close(result, layers.finish(epilogue, sums, bias, residual))


@pytest.mark.parametrize("sizes", [(1, 28, 28), (2, 17, 35), (1, 1, 1), (1, 3, 40)])
@pytest.mark.parametrize("channels", [(3, 32), (16, 40)])
def test_stem_and_downsampling(rng, assert_close, host, sizes, channels):
    check(rng, assert_close, host, sizes, channels)


def test_weights_larger_than_the_cache(rng, assert_close, host):
    full = Epilogue(bias=True, activation="gelu", residual=True)
    check(rng, assert_close, host, (2, 13, 13), (128, 160), epilogue=full)


@pytest.mark.parametrize("sizes", [(1, 14, 14), (2, 9, 13)])
def test_dynamic_sizes(rng, assert_close, host, sizes):
    n, h, w = (tirx.Var(name, "int64") for name in "nhw")
    check(rng, assert_close, host, sizes, (8, 32), given=(n, *sizes[1:]))
    check(rng, assert_close, host, sizes, (8, 32), given=(n, h, w))
    check(rng, assert_close, host, sizes, (8, 40), given=(n, h, w))


def test_odd_windows(rng, assert_close, host):
    check(
        rng,
        assert_close,
        host,
        (1, 11, 12),
        (5, 37),
        kernel=(5, 2),
        stride=(1, 3),
        pad=(2, 0),
    )


def test_other_instruction_sets(rng, assert_close, target):
    check(rng, assert_close, target, (1, 14, 14), (8, 24))


@pytest.mark.parametrize("channels", [(3, 32), (128, 256)])
def test_sums_stay_in_registers(host, channels):
    func = convolution(
        1,
        28,
        28,
        *channels,
        kernel_size=(3, 3),
        stride=(2, 2),
        pad=(1, 1),
        tile=weight_tile_width(channels[1], host),
    )
    found = schedule(func, host)
    assert found.rule == "convolution"
    assert {"PARALLEL", "VECTORIZED"} <= loop_kinds(found.function)
    assert "local" in buffer_scopes(found.function)
    # The border is tested where the image is padded, not where the window is summed.
    assert "prim.if_then_else" in called(block_body(found.function, "padded"))
    assert "prim.if_then_else" not in called(block_body(found.function, "sums_update"))
