"""Kernels and encoders for AArch64, run under QEMU and compared with float64."""

import numpy as np
import pytest

from dcnv3_tvm.kernels.convolution import convolution
from dcnv3_tvm.kernels.depthwise import depthwise
from dcnv3_tvm.kernels.epilogue import Epilogue
from dcnv3_tvm.kernels.layer_norm import layer_norm
from dcnv3_tvm.kernels.matmul import matmul
from dcnv3_tvm.kernels.packing import pack_convolution_weight, pack_matmul_weight
from dcnv3_tvm.op import tensorir
from dcnv3_tvm.schedules import row_slack
from dcnv3_tvm.spec import DCNv3Spec
from dcnv3_tvm.verify.compare import difference
from dcnv3_tvm.verify.tolerances import LAYER
from helpers import arm64, layers, operator
from helpers.arm64 import Problem
from helpers.arrays import random_array
from helpers.encoders import random_encoder
from helpers.specs import random_inputs

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(arm64.missing() is not None, reason=str(arm64.missing())),
]

TILE = 8
FULL = Epilogue(bias=True, activation="gelu", residual=True)

SPECS = {
    "groups_of_16": DCNv3Spec.of((1, 7, 9, 64), group=4, softmax=True),
    "groups_of_12": DCNv3Spec.of((2, 5, 6, 36), group=3, softmax=True),
    "one_group_of_7": DCNv3Spec.of((1, 6, 5, 7), group=1, kernel_size=5, pad=2, softmax=True),
}
"""Vectors and pairs of groups; vectors that are not whole; channels and points of no vector."""


def matmul_problem(rng, sizes, inner, columns):
    x, weight = random_array(rng, *sizes, inner), random_array(rng, columns, inner) / inner**0.5
    bias, residual = random_array(rng, columns), random_array(rng, *sizes, columns)
    slack = row_slack(int(np.prod(sizes)))
    func = matmul(sizes, inner, columns, tile=TILE, row_slack=slack, epilogue=FULL)
    reference = layers.finish(FULL, x @ weight.T.astype("float64"), bias, residual)
    given = [x, pack_matmul_weight(weight, TILE), bias, residual]
    return Problem(func, given, reference.shape), reference


def convolution_problem(rng, shape, columns):
    x, weight = random_array(rng, *shape), random_array(rng, columns, shape[-1], 3, 3)
    window = {"stride": (2, 2), "pad": (1, 1)}
    func = convolution(*shape, columns, kernel_size=(3, 3), **window, tile=TILE)
    reference = layers.convolution(x, weight, **window)
    return Problem(func, [x, pack_convolution_weight(weight, TILE)], reference.shape), reference


def depthwise_problem(rng, shape):
    channels = shape[-1]
    x, weight = random_array(rng, *shape), random_array(rng, 3, 3, channels)
    bias, gamma, beta = (random_array(rng, channels) for _ in range(3))
    window = {"stride": (1, 1), "pad": (1, 1)}
    options = {"bias": True, "norm_eps": 1e-6, "activation": "gelu"}
    func = depthwise(*shape, kernel_size=(3, 3), **window, **options)
    sums = layers.depthwise(x, weight, **window) + bias
    reference = layers.activation("gelu", layers.layer_norm(sums, gamma, beta, 1e-6))
    return Problem(func, [x, weight, bias, gamma, beta], shape), reference


def layer_norm_problem(rng, rows, channels):
    x = random_array(rng, rows, channels)
    gamma, beta = random_array(rng, channels), random_array(rng, channels)
    func = layer_norm((rows,), channels, eps=1e-6)
    return Problem(func, [x, gamma, beta], x.shape), layers.layer_norm(x, gamma, beta, 1e-6)


def operator_problem(spec, inputs):
    given = operator.arguments(spec, inputs, packed=True)
    func = tensorir.dcnv3_packed(spec, vector_loads=False)
    return Problem(func, given, operator.output_shape(spec, inputs))


@pytest.fixture
def layer_problems(rng):
    return {
        "matmul": matmul_problem(rng, (2, 7, 7), 24, 40),
        "matmul_with_slack": matmul_problem(rng, (17, 19), 20, 75),
        "matmul_of_19_inputs": matmul_problem(rng, (13,), 19, 27),
        "convolution": convolution_problem(rng, (1, 9, 13, 8), 20),
        "convolution_of_3_inputs": convolution_problem(rng, (2, 10, 14, 3), 16),
        "depthwise": depthwise_problem(rng, (1, 5, 14, 24)),
        "depthwise_of_13_channels": depthwise_problem(rng, (1, 3, 7, 13)),
        "layer_norm": layer_norm_problem(rng, 21, 40),
        "layer_norm_of_18_channels": layer_norm_problem(rng, 5, 18),
    }


def check_encoder(encoder, outputs, dtype):
    expected = [array for arrays in encoder.reference.values() for array in arrays]
    assert len(outputs) == len(expected) == 1 + 4
    for output, reference in zip(outputs, expected, strict=True):
        assert difference("output", output, reference).within(dtype)


def test_float32(tmp_path, layer_problems):
    inputs = {name: random_inputs(spec) for name, spec in SPECS.items()}
    problems = {name: problem for name, (problem, _) in layer_problems.items()}
    problems |= {name: operator_problem(spec, inputs[name]) for name, spec in SPECS.items()}
    encoder = random_encoder("test_internimage_post_norm", (2, 3, 64, 96))
    results, outputs = arm64.run(
        tmp_path, "linux-aarch64:neoverse-n1", problems, encoder.imported, encoder.image
    )
    for name, (_, reference) in layer_problems.items():
        error = np.abs(results[name] - reference).max()
        assert error <= LAYER["float32"] * max(1.0, np.abs(reference).max()), name
    for name, spec in SPECS.items():
        operator.check(results[name], spec, inputs[name])
    check_encoder(encoder, outputs, "float32")


def test_bfloat16(tmp_path):
    encoder = random_encoder("test_internimage_post_norm_scale", (2, 3, 64, 96))
    _, outputs = arm64.run(
        *(tmp_path, "linux-aarch64:neoverse-v1", {}, encoder.imported, encoder.image),
        dtype="bfloat16",
    )
    check_encoder(encoder, outputs, "bfloat16")
