import numpy as np
import pytest
from tvm import relax

from dcnv3_tvm.transform.fold_weights import fold_weights
from helpers.arrays import random_array
from helpers.programs import make_program, operators, run_program


def _assert_same(program, folded, *inputs):
    relax.analysis.well_formed(folded.module)
    expected = run_program(program, *inputs)
    np.testing.assert_allclose(
        run_program(folded, *inputs), expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max()
    )


def _conv(bb, x, weight):
    call = relax.op.nn.conv2d(
        x, weight, padding=1, data_layout="NHWC", kernel_layout="OHWI", out_layout="NHWC"
    )
    return bb.emit(call)


def _batch_norm(bb, x, gamma, beta, mean, variance):
    call = relax.op.nn.batch_norm(
        x, gamma, beta, mean, variance, axis=3, epsilon=1e-3, training=False
    )
    return bb.emit(relax.TupleGetItem(bb.emit(call), 0))


def _statistics(rng, channels):
    return {
        "gamma": random_array(rng, channels),
        "beta": random_array(rng, channels),
        "mean": random_array(rng, channels),
        "variance": np.abs(random_array(rng, channels)) + 0.1,
    }


@pytest.mark.parametrize("bias", [False, True])
def test_batch_norm_is_folded_into_the_convolution_before_it(rng, bias):
    def build(bb, x, weight, shift, *statistics):
        value = _conv(bb, x, weight)
        if bias:
            value = bb.emit(relax.op.add(value, shift))
        return _batch_norm(bb, value, *statistics)

    weights = {"weight": random_array(rng, 5, 3, 3, 4), "shift": random_array(rng, 5)}
    program = make_program(build, {"x": (2, 6, 5, 4)}, weights | _statistics(rng, 5))
    folded = fold_weights(program)
    assert operators(folded) == ["relax.nn.conv2d", "relax.add"]
    _assert_same(program, folded, random_array(rng, 2, 6, 5, 4))


def test_batch_norm_without_convolution_becomes_scale_and_shift(rng):
    program = make_program(_batch_norm, {"x": (2, 6, 5, 4)}, _statistics(rng, 4))
    folded = fold_weights(program)
    assert operators(folded) == ["relax.multiply", "relax.add"]
    _assert_same(program, folded, random_array(rng, 2, 6, 5, 4))


def test_batch_norm_is_not_folded_into_a_value_with_two_readers(rng):
    def build(bb, x, weight, *statistics):
        value = _conv(bb, x, weight)
        return bb.emit(relax.op.add(_batch_norm(bb, value, *statistics), value))

    weights = {"weight": random_array(rng, 5, 3, 3, 4)} | _statistics(rng, 5)
    program = make_program(build, {"x": (1, 6, 5, 4)}, weights)
    folded = fold_weights(program)
    assert operators(folded) == ["relax.nn.conv2d", "relax.multiply", "relax.add", "relax.add"]
    _assert_same(program, folded, random_array(rng, 1, 6, 5, 4))


@pytest.mark.parametrize("first", [False, True])
def test_layer_scale_is_folded_into_matmul_and_bias(rng, first):
    def build(bb, x, weight, bias, gamma):
        value = bb.emit(relax.op.add(bias, bb.emit(relax.op.matmul(x, weight))))
        operands = (gamma, value) if first else (value, gamma)
        return bb.emit(relax.op.add(x, bb.emit(relax.op.multiply(*operands))))

    weights = {
        "weight": random_array(rng, 6, 6),
        "bias": random_array(rng, 6),
        "gamma": random_array(rng, 6),
    }
    program = make_program(build, {"x": (2, 3, 6)}, weights)
    folded = fold_weights(program)
    assert operators(folded) == ["relax.matmul", "relax.add", "relax.add"]
    _assert_same(program, folded, random_array(rng, 2, 3, 6))


def test_layer_scale_is_folded_into_layer_norm(rng):
    def build(bb, x, weight, bias, gamma):
        value = bb.emit(relax.op.nn.layer_norm(x, weight, bias, axes=[-1]))
        return bb.emit(relax.op.multiply(gamma, value))

    weights = {name: random_array(rng, 6) for name in ("weight", "bias", "gamma")}
    program = make_program(build, {"x": (2, 3, 6)}, weights)
    folded = fold_weights(program)
    assert operators(folded) == ["relax.nn.layer_norm"]
    _assert_same(program, folded, random_array(rng, 2, 3, 6))


def test_other_factors_are_not_folded(rng):
    # As many numbers as there are channels, but along another axis.
    program = make_program(
        lambda bb, x, w: bb.emit(relax.op.multiply(x, w)),
        {"x": (2, 3, 3)},
        {"w": random_array(rng, 3, 1)},
    )
    folded = fold_weights(program)
    assert operators(folded) == ["relax.multiply"]
    _assert_same(program, folded, random_array(rng, 2, 3, 3))


def test_constants_are_evaluated(rng):
    def build(bb, x, first, second):
        joined = bb.emit(relax.op.concat([first, second], axis=0))
        transposed = bb.emit(relax.op.permute_dims(joined))
        shaped = bb.emit(relax.op.reshape(transposed, (4, 5)))
        return bb.emit(relax.op.matmul(x, bb.emit(relax.op.multiply(shaped, shaped))))

    weights = {"first": random_array(rng, 2, 4), "second": random_array(rng, 3, 4)}
    program = make_program(build, {"x": (2, 4)}, weights)
    folded = fold_weights(program)
    assert operators(folded) == ["relax.matmul"]
    assert len(folded.weights) == 1
    _assert_same(program, folded, random_array(rng, 2, 4))


def test_bias_of_any_shape_becomes_a_vector(rng):
    program = make_program(
        lambda bb, x, bias: bb.emit(relax.op.add(bias, x)),
        {"x": (2, 3, 4, 5)},
        {"bias": random_array(rng, 1, 1, 1, 5)},
    )
    folded = fold_weights(program)
    assert [array.shape for array in folded.weights.values()] == [(5,)]
    _assert_same(program, folded, random_array(rng, 2, 3, 4, 5))
