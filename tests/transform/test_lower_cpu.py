import numpy as np
import pytest
from tvm import relax

from dcnv3_tvm.transform.find_layers import absorbed_values, find_layers
from dcnv3_tvm.transform.lower_cpu import CpuTiling, lower_cpu
from helpers.arrays import random_array
from helpers.programs import make_program, operators, run_program

TILING = CpuTiling(weight_tile_width=lambda _outputs: 16, row_slack=lambda _rows: 0)


def _conv(bb, x, weight, **attrs):
    call = relax.op.nn.conv2d(
        x, weight, data_layout="NHWC", kernel_layout="OHWI", out_layout="NHWC", **attrs
    )
    return bb.emit(call)


def _lowered(program, *inputs):
    lowered = lower_cpu(program, TILING)
    relax.analysis.well_formed(lowered.module)
    expected = run_program(program, *inputs)
    result = run_program(lowered, *inputs)
    np.testing.assert_allclose(result, expected, rtol=1e-4, atol=2e-5 * np.abs(expected).max())
    return lowered


def test_matmul_absorbs_bias_activation_and_residual(rng):
    def build(bb, x, skip, weight, bias):
        value = bb.emit(relax.op.add(bb.emit(relax.op.matmul(x, weight)), bias))
        return bb.emit(relax.op.add(skip, bb.emit(relax.op.nn.gelu(value))))

    weights = {"weight": random_array(rng, 10, 21), "bias": random_array(rng, 21)}
    program = make_program(build, {"x": (2, 3, 5, 10), "skip": (2, 3, 5, 21)}, weights)
    lowered = _lowered(program, random_array(rng, 2, 3, 5, 10), random_array(rng, 2, 3, 5, 21))
    assert operators(lowered) == ["matmul_10_21_gelu_residual"]
    assert lowered.weights["weight:packed"].shape == (2, 10, 16)


def test_value_with_two_readers_ends_the_layer(rng):
    def build(bb, x, weight, bias):
        value = bb.emit(relax.op.add(bb.emit(relax.op.matmul(x, weight)), bias))
        return bb.emit(relax.op.multiply(bb.emit(relax.op.nn.gelu(value)), value))

    weights = {"weight": random_array(rng, 10, 21), "bias": random_array(rng, 21)}
    program = make_program(build, {"x": (4, 10)}, weights)
    lowered = _lowered(program, random_array(rng, 4, 10))
    assert operators(lowered) == ["matmul_10_21", "relax.nn.gelu", "relax.multiply"]


def test_matmul_without_weight_is_left_to_tvm(rng):
    program = make_program(
        lambda bb, x, y: bb.emit(relax.op.matmul(x, y)), {"x": (2, 3, 4), "y": (2, 4, 5)}, {}
    )
    lowered = _lowered(program, random_array(rng, 2, 3, 4), random_array(rng, 2, 4, 5))
    assert operators(lowered) == ["relax.matmul"]


@pytest.mark.parametrize(
    ("kernel", "attrs", "name"),
    [
        (3, {"strides": 2, "padding": 1}, "convolution_6_9"),
        (1, {}, "matmul_6_9"),
        (1, {"strides": 2}, "convolution_6_9"),
        (3, {"padding": (0, 2)}, "convolution_6_9"),
    ],
)
def test_convolution_absorbs_its_bias(rng, kernel, attrs, name):
    def build(bb, x, weight, bias):
        return bb.emit(relax.op.add(_conv(bb, x, weight, **attrs), bias))

    weights = {"weight": random_array(rng, 9, kernel, kernel, 6), "bias": random_array(rng, 9)}
    lowered = _lowered(
        make_program(build, {"x": (2, 7, 5, 6)}, weights), random_array(rng, 2, 7, 5, 6)
    )
    assert operators(lowered) == [name]


@pytest.mark.parametrize("attrs", [{"dilation": 2}, {"padding": (1, 0, 0, 1)}, {"groups": 2}])
def test_unsupported_convolution_is_left_to_tvm(rng, attrs):
    weight = random_array(rng, 8, 3, 3, 6 // attrs.get("groups", 1))
    program = make_program(
        lambda bb, x, w: _conv(bb, x, w, **attrs), {"x": (1, 7, 6, 6)}, {"w": weight}
    )
    lowered = lower_cpu(program, TILING)
    assert operators(lowered) == ["relax.nn.conv2d"]


@pytest.mark.parametrize("kernel", [3, 5])
def test_depthwise_convolution_absorbs_bias_norm_and_activation(rng, kernel):
    def build(bb, x, weight, bias, gamma, beta):
        value = _conv(bb, x, weight, padding=kernel // 2, groups=6)
        value = bb.emit(relax.op.add(value, bias))
        value = bb.emit(relax.op.nn.layer_norm(value, gamma, beta, axes=[-1], epsilon=1e-6))
        return bb.emit(relax.op.nn.gelu(value))

    weights = {
        "weight": random_array(rng, 6, kernel, kernel, 1),
        "bias": random_array(rng, 6),
        "gamma": random_array(rng, 6),
        "beta": random_array(rng, 6),
    }
    lowered = _lowered(
        make_program(build, {"x": (2, 7, 5, 6)}, weights), random_array(rng, 2, 7, 5, 6)
    )
    assert operators(lowered) == ["depthwise_6_gelu"]


@pytest.mark.parametrize("swapped", [False, True])
def test_layer_norm_absorbs_the_residual_sum(rng, swapped):
    def build(bb, x, skip, gamma, beta):
        value = bb.emit(relax.op.nn.layer_norm(x, gamma, beta, axes=[-1], epsilon=1e-6))
        operands = (value, skip) if swapped else (skip, value)
        return bb.emit(relax.op.add(*operands))

    shape = (2, 3, 7)
    weights = {"gamma": random_array(rng, 7), "beta": random_array(rng, 7)}
    program = make_program(build, {"x": shape, "skip": shape}, weights)
    lowered = _lowered(program, random_array(rng, *shape), random_array(rng, *shape))
    assert operators(lowered) == ["layer_norm_7_residual"]


def test_layer_norm_over_other_axes_is_left_to_tvm(rng):
    weights = {"gamma": random_array(rng, 3, 7), "beta": random_array(rng, 3, 7)}
    program = make_program(
        lambda bb, x, g, b: bb.emit(relax.op.nn.layer_norm(x, g, b, axes=[-2, -1])),
        {"x": (2, 3, 7)},
        weights,
    )
    assert operators(lower_cpu(program, TILING)) == ["relax.nn.layer_norm"]


def test_broadcast_sum_is_not_absorbed(rng):
    def build(bb, x, skip, weight):
        return bb.emit(relax.op.add(bb.emit(relax.op.matmul(x, weight)), skip))

    program = make_program(
        build, {"x": (2, 3, 4), "skip": (1, 3, 6)}, {"weight": random_array(rng, 4, 6)}
    )
    lowered = _lowered(program, random_array(rng, 2, 3, 4), random_array(rng, 1, 3, 6))
    assert operators(lowered) == ["matmul_4_6", "relax.add"]


def test_kernels_take_symbolic_sizes(rng):
    def build(bb, x, weight, bias):
        return bb.emit(relax.op.add(_conv(bb, x, weight, strides=2, padding=1), bias))

    weights = {"weight": random_array(rng, 9, 3, 3, 6), "bias": random_array(rng, 9)}
    program = make_program(build, {"x": ("n", "h", "w", 6)}, weights)
    lowered = lower_cpu(program, TILING)
    for size in ((1, 7, 5), (2, 8, 3)):
        x = random_array(rng, *size, 6)
        np.testing.assert_allclose(
            run_program(lowered, x), run_program(program, x), rtol=1e-4, atol=1e-4
        )


def test_layers_are_keyed_by_their_result(rng):
    def build(bb, x, weight, bias):
        return bb.emit(relax.op.add(bb.emit(relax.op.matmul(x, weight)), bias))

    weights = {"weight": random_array(rng, 4, 6), "bias": random_array(rng, 6)}
    program = make_program(build, {"x": (2, 4)}, weights)
    (layer,) = find_layers(program.module["main"], 1).values()
    assert (layer.kind, layer.activation, layer.residual) == ("matmul", None, None)
    assert layer.bias.name == "bias"


def test_absorbed_values_are_inside_a_layer_or_dead(rng):
    def build(bb, x, weight):
        bb.emit(relax.op.nn.relu(x))
        return bb.emit(relax.op.nn.gelu(bb.emit(relax.op.matmul(x, weight))))

    program = make_program(build, {"x": (2, 4)}, {"weight": random_array(rng, 4, 6)})
    function = program.module["main"]
    absorbed = absorbed_values(function, find_layers(function, 1))
    values = [
        binding.value for binding in function.body.blocks[0].bindings if binding.var in absorbed
    ]
    assert [value.op.name for value in values] == ["relax.nn.relu", "relax.matmul"]
