import numpy as np
import pytest
from tvm import tirx

from dcnv3_tvm.errors import InvalidArgumentError
from dcnv3_tvm.kernels.activations import ACTIVATIONS, activate
from dcnv3_tvm.kernels.convolution import convolution
from dcnv3_tvm.kernels.depthwise import depthwise as depthwise_kernel
from dcnv3_tvm.kernels.epilogue import Epilogue
from dcnv3_tvm.kernels.gemm import GemmPadding
from dcnv3_tvm.kernels.layer_norm import layer_norm as layer_norm_kernel
from dcnv3_tvm.kernels.matmul import matmul
from dcnv3_tvm.kernels.mlp import mlp
from dcnv3_tvm.kernels.packing import column_parts, pack_convolution_weight, pack_matmul_weight
from dcnv3_tvm.op.expr import KERNEL_ATTR
from dcnv3_tvm.verify.tolerances import LAYER
from helpers import layers
from helpers.arrays import random_array
from helpers.layers import run_kernel


def assert_close(result, reference, dtype="float32"):
    limit = LAYER[dtype] * max(1.0, np.abs(reference).max())
    np.testing.assert_allclose(result, reference, rtol=0, atol=limit)


@pytest.mark.parametrize("epilogue", [Epilogue(), Epilogue(True, "relu", True)])
@pytest.mark.parametrize("row_slack", [0, 15])
@pytest.mark.parametrize(("columns", "tile"), [(8, 4), (11, 4), (3, 16), (25, 16)])
def test_matmul(rng, columns, tile, row_slack, epilogue):
    x, weight = random_array(rng, 2, 3, 5), random_array(rng, columns, 5)
    bias, residual = random_array(rng, columns), random_array(rng, 2, 3, columns)
    func = matmul((2, 3), 5, columns, tile=tile, row_slack=row_slack, epilogue=epilogue)
    given = [x, pack_matmul_weight(weight, tile)]
    given += [bias, residual] if epilogue.bias else []
    result = run_kernel(func, given, (2, 3, columns), scheduled=False)
    assert_close(result, layers.finish(epilogue, x @ weight.T.astype("float64"), bias, residual))


def test_matmul_in_float64(rng):
    x, weight = random_array(rng, 7, 5, dtype="float64"), random_array(rng, 6, 5, dtype="float64")
    func = matmul((7,), 5, 6, tile=4, dtype="float64")
    result = run_kernel(func, [x, pack_matmul_weight(weight, 4)], (7, 6), scheduled=False)
    assert_close(result, x @ weight.T, "float64")


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_epilogue_activations(rng, name):
    x, weight = random_array(rng, 30, 2) * 4, random_array(rng, 6, 2)
    func = matmul((30,), 2, 6, tile=4, epilogue=Epilogue(activation=name))
    result = run_kernel(func, [x, pack_matmul_weight(weight, 4)], (30, 6), scheduled=False)
    assert_close(result, layers.activation(name, x @ weight.T.astype("float64")))


def test_unknown_activation_is_an_error():
    with pytest.raises(InvalidArgumentError, match=r"'swish'.*allowed: gelu, relu, sigmoid, silu"):
        activate("swish", tirx.Var("x", "float32"))


@pytest.mark.parametrize(
    ("kernel", "stride", "pad"),
    [((3, 3), (2, 2), (1, 1)), ((1, 5), (1, 3), (0, 2)), ((2, 3), (1, 1), (0, 0))],
)
def test_convolution(rng, kernel, stride, pad):
    x, weight = random_array(rng, 2, 7, 9, 3), random_array(rng, 5, 3, *kernel)
    func = convolution(2, 7, 9, 3, 5, kernel_size=kernel, stride=stride, pad=pad, tile=4)
    reference = layers.convolution(x, weight, stride=stride, pad=pad)
    packed = pack_convolution_weight(weight, 4)
    assert_close(run_kernel(func, [x, packed], reference.shape, scheduled=False), reference)


def test_convolution_with_an_epilogue(rng):
    epilogue = Epilogue(bias=True, activation="gelu", residual=True)
    x, weight, bias = (
        random_array(rng, 1, 4, 5, 3),
        random_array(rng, 6, 3, 3, 3),
        random_array(rng, 6),
    )
    residual = random_array(rng, 1, 4, 5, 6)
    shape = {"stride": (1, 1), "pad": (1, 1)}
    func = convolution(1, 4, 5, 3, 6, kernel_size=(3, 3), tile=4, epilogue=epilogue, **shape)
    given = [x, pack_convolution_weight(weight, 4), bias, residual]
    sums = layers.convolution(x, weight, **shape)
    reference = layers.finish(epilogue, sums, bias, residual)
    assert_close(run_kernel(func, given, residual.shape, scheduled=False), reference)


@pytest.mark.parametrize("normalized", [False, True])
@pytest.mark.parametrize("stride", [(1, 1), (2, 1)])
def test_depthwise_convolution_norm_and_activation(rng, stride, normalized):
    x, weight, bias = (
        random_array(rng, 2, 5, 7, 6),
        random_array(rng, 3, 5, 6),
        random_array(rng, 6),
    )
    gamma, beta = random_array(rng, 6), random_array(rng, 6)
    func = depthwise_kernel(
        2,
        5,
        7,
        6,
        kernel_size=(3, 5),
        stride=stride,
        pad=(1, 2),
        bias=True,
        norm_eps=1e-6 if normalized else None,
        activation="gelu",
    )
    sums = layers.depthwise(x, weight, stride=stride, pad=(1, 2)) + bias
    normal = layers.layer_norm(sums, gamma, beta, 1e-6) if normalized else sums
    given = [x, weight, bias, *([gamma, beta] if normalized else [])]
    result = run_kernel(func, given, sums.shape, scheduled=False)
    assert_close(result, layers.activation("gelu", normal))


def test_layer_norm_with_activation_and_residual(rng):
    x, gamma, beta, residual = (random_array(rng, *shape) for shape in ((2, 9), (9,), (9,), (2, 9)))
    func = layer_norm_kernel((2,), 9, eps=1e-6, activation="relu", residual=True)
    normal = layers.layer_norm(x, gamma, beta, 1e-6)
    result = run_kernel(func, [x, gamma, beta, residual], (2, 9), scheduled=False)
    assert_close(result, np.maximum(normal, 0) + residual)


def test_packed_weights_are_zero_padded(rng):
    weight = random_array(rng, 6, 2, 3, 3)
    packed = pack_convolution_weight(weight, 4)
    assert packed.shape == (2, 3, 3, 2, 4)
    assert packed.flags.c_contiguous
    for channel in range(8):
        expected = weight[channel].transpose(1, 2, 0) if channel < 6 else 0
        assert (packed[channel // 4, ..., channel % 4] == expected).all()


def test_column_parts_cover_every_channel_once():
    for tile in (8, 16, 32):
        for channels in range(1, 100):
            covered = []
            for part in column_parts(channels, tile):
                covered += range(part.start, part.start + part.width)
                assert part.width % tile == 0 or part.width <= tile // 2
            assert covered == list(range(channels))


@pytest.mark.parametrize(
    ("func", "name"),
    [
        (matmul((3,), 4, 4, tile=4), "matmul"),
        (layer_norm_kernel((3,), 4, eps=1e-6), "layer_norm"),
    ],
)
def test_kernels_carry_their_name(func, name):
    assert func.attrs[KERNEL_ATTR] == name
    assert func.attrs["tirx.noalias"]


def test_mlp_needs_whole_hidden_tiles():
    padding = GemmPadding(rows=16, columns=16, depth=16, vector=8)
    with pytest.raises(InvalidArgumentError, match=r"40 hidden features.*a multiple of 16"):
        mlp((8,), 16, 40, 16, padding=padding, activation="gelu", residual=False, dtype="float16")
