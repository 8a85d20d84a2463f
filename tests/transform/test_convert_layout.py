import numpy as np
import pytest
from tvm import relax

from dcnv3_tvm.transform.convert_layout import convert_layout
from helpers.programs import make_program, operators, run_program


def _permutes(program):
    return operators(program).count("relax.permute_dims")


def test_stem_keeps_one_transpose(rng):
    def build(bb, image, first, gamma, beta, second):
        value = bb.emit(relax.op.nn.conv2d(image, first, strides=2, padding=1))
        value = bb.emit(relax.op.permute_dims(value, [0, 2, 3, 1]))
        value = bb.emit(relax.op.nn.layer_norm(value, gamma, beta, axes=[-1]))
        value = bb.emit(relax.op.permute_dims(value, [0, 3, 1, 2]))
        value = bb.emit(relax.op.nn.gelu(value))
        value = bb.emit(relax.op.nn.conv2d(value, second, strides=2, padding=1))
        return bb.emit(relax.op.permute_dims(value, [0, 2, 3, 1]))

    weights = {
        "first": rng.standard_normal((4, 3, 3, 3)).astype("float32"),
        "gamma": rng.standard_normal(4).astype("float32"),
        "beta": rng.standard_normal(4).astype("float32"),
        "second": rng.standard_normal((5, 4, 3, 3)).astype("float32"),
    }
    image = rng.standard_normal((1, 3, 11, 14)).astype("float32")
    program = make_program(build, {"image": image.shape}, weights)
    converted = convert_layout(program)
    # The image comes in NCHW; the weights' transposes are folded by the next pass.
    assert _permutes(converted) == 1 + 2
    np.testing.assert_allclose(
        run_program(converted, image), run_program(program, image), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_convolutions_become_nhwc(rng, groups):
    def build(bb, image, weight):
        return bb.emit(relax.op.nn.conv2d(image, weight, padding=1, groups=groups))

    weights = {"weight": rng.standard_normal((4, 4 // groups, 3, 3)).astype("float32")}
    image = rng.standard_normal((2, 4, 5, 7)).astype("float32")
    program = make_program(build, {"image": image.shape}, weights)
    converted = convert_layout(program)
    # The image, the weight (which is only viewed where it has one input channel), and back.
    number = operators(converted).index("relax.nn.conv2d")
    assert _permutes(converted) == (2 if groups == 4 else 3)
    convolution = converted.module["main"].body.blocks[0].bindings[number].value
    assert (convolution.attrs.data_layout, convolution.attrs.kernel_layout) == ("NHWC", "OHWI")
    np.testing.assert_allclose(
        run_program(converted, image), run_program(program, image), rtol=1e-4, atol=1e-5
    )


def test_transposed_convolution_stays_nchw(rng):
    def build(bb, image, first, up, second):
        value = bb.emit(relax.op.nn.conv2d(image, first, padding=1))
        value = bb.emit(relax.op.nn.conv2d_transpose(value, up, strides=2))
        value = bb.emit(relax.op.nn.conv2d(bb.emit(relax.op.nn.relu(value)), second))
        return bb.emit(relax.op.permute_dims(value, [0, 2, 3, 1]))

    weights = {
        "first": rng.standard_normal((4, 3, 3, 3)).astype("float32"),
        "up": rng.standard_normal((4, 5, 2, 2)).astype("float32"),
        "second": rng.standard_normal((2, 5, 1, 1)).astype("float32"),
    }
    image = rng.standard_normal((1, 3, 5, 6)).astype("float32")
    program = make_program(build, {"image": image.shape}, weights)
    converted = convert_layout(program)
    # The image, one on each side of the transposed convolution, and the weights of convolutions
    # (one of which is of one pixel, and needs no copy).
    assert _permutes(converted) == 3 + 1
    np.testing.assert_allclose(
        run_program(converted, image), run_program(program, image), rtol=1e-4, atol=1e-5
    )
