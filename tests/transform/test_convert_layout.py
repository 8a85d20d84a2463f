import numpy as np
from tvm import relax

from dcnv3_tvm.testing.programs import make_program, operators, run_program
from dcnv3_tvm.transform.convert_layout import convert_layout


def _permutes(program):
    return operators(program).count("relax.permute_dims")


def test_a_stem_keeps_one_transpose(rng):
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


def test_two_transposes_become_one(rng):
    def build(bb, x):
        value = bb.emit(relax.op.permute_dims(x, [0, 2, 1]))
        return bb.emit(relax.op.permute_dims(value, [2, 0, 1]))

    x = rng.standard_normal((2, 3, 4)).astype("float32")
    program = make_program(build, {"x": x.shape}, {})
    converted = convert_layout(program)
    assert operators(converted) == ["relax.permute_dims"]
    np.testing.assert_array_equal(
        run_program(converted, x), x.transpose(0, 2, 1).transpose(2, 0, 1)
    )


def test_a_transpose_of_axes_of_size_one_is_a_view():
    program = make_program(
        lambda bb, x: bb.emit(relax.op.permute_dims(x, [0, 3, 1, 2])), {"x": (2, 1, 1, 5)}, {}
    )
    assert operators(convert_layout(program)) == ["relax.reshape"]


def test_a_transpose_used_twice_stays_where_it_is():
    def build(bb, x):
        value = bb.emit(relax.op.permute_dims(x, [1, 0]))
        return bb.emit(relax.op.add(bb.emit(relax.op.nn.gelu(value)), value))

    converted = convert_layout(make_program(build, {"x": (2, 3)}, {}))
    assert operators(converted) == ["relax.permute_dims", "relax.nn.gelu", "relax.add"]


def test_reshapes_are_merged_and_empty_ones_removed():
    def build(bb, x):
        value = bb.emit(relax.op.reshape(x, (3, 2)))
        value = bb.emit(relax.op.reshape(value, (6,)))
        return bb.emit(relax.op.reshape(value, (6,)))

    assert operators(convert_layout(make_program(build, {"x": (2, 3)}, {}))) == ["relax.reshape"]
