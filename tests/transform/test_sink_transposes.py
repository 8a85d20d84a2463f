import numpy as np
import pytest
from tvm import relax

from dcnv3_tvm.transform.fold_weights import fold_weights
from dcnv3_tvm.transform.sink_transposes import sink_transposes
from helpers.programs import make_program, operators, run_program

FIRST = [0, 3, 1, 2]
OP = relax.op
SHAPE = (2, 3, 5, 4)
"""Of a channels-last input; transposed it is (2, 4, 3, 5)."""


def sunk(program, *inputs):
    """Sink the transposes and check that the results stay the same."""
    moved = sink_transposes(program)
    found, expected = run_program(moved, *inputs), run_program(program, *inputs)
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    return moved


def transposed(operator):
    """Build a function that applies an operator to a transpose."""
    return lambda bb, x, *rest: bb.emit(operator(bb.emit(OP.permute_dims(x, FIRST)), *rest))


ONE_OPERAND = {
    "relu": OP.nn.relu,
    "leakyrelu": lambda x: OP.nn.leakyrelu(x, 0.1),
    "clip": lambda x: OP.clip(x, -1, 1),
    "astype": lambda x: OP.astype(x, "int32"),
    "scalar": lambda x: OP.multiply(relax.const(2.5, "float32"), x),
    "softmax": lambda x: OP.nn.softmax(x, 1),
    "log_softmax": lambda x: OP.nn.log_softmax(x, -1),
    "mean": lambda x: OP.mean(x, [1]),
    "mean of the pixels": lambda x: OP.mean(x, [2, 3], keepdims=True),
    "sum": lambda x: OP.sum(x, [2], keepdims=True),
    "max": lambda x: OP.max(x, [-1]),
    "min": lambda x: OP.min(x, [0, 2]),
    "prod": lambda x: OP.prod(x, [2]),
    "variance": lambda x: OP.variance(x, [1, 3]),
    "std": lambda x: OP.std(x, [2, 3], keepdims=True),
    "argmax": lambda x: OP.argmax(x, 1),
    "argmin": lambda x: OP.argmin(x, -1, keepdims=True),
    "pad": lambda x: OP.nn.pad(x, [0, 0, 1, 2, 3, 4, 5, 6]),
    "max_pool2d": lambda x: OP.nn.max_pool2d(x, (3, 2), strides=2, padding=1),
    "avg_pool2d": lambda x: OP.nn.avg_pool2d(x, 3, padding=1, count_include_pad=True),
    "adaptive_avg_pool2d": lambda x: OP.nn.adaptive_avg_pool2d(x, (2, 3)),
    "resize2d": lambda x: OP.image.resize2d(x, (7, 6), method="cubic"),
}


@pytest.mark.parametrize("name", ONE_OPERAND)
def test_sinks_through_layout_agnostic_operators(name, rng):
    x = rng.standard_normal(SHAPE).astype("float32")
    moved = sunk(make_program(transposed(ONE_OPERAND[name]), {"x": SHAPE}, {}), x)
    first, *rest = operators(moved)
    assert first not in ("relax.permute_dims", "relax.reshape")
    assert set(rest) <= {"relax.permute_dims", "relax.reshape"}


@pytest.mark.parametrize(
    ("name", "operator"),
    [
        ("group_norm", lambda x, a, b: OP.nn.group_norm(x, a, b, 2, 1, [2, 3])),
        ("instance_norm", lambda x, a, b: OP.nn.instance_norm(x, a, b, 1, [2, 3])),
        ("prelu", lambda x, a, _: OP.nn.prelu(x, a, 1)),
    ],
)
def test_sinks_through_operators_with_a_channel_axis(name, operator, rng):
    x = rng.standard_normal(SHAPE).astype("float32")
    weights = {key: rng.standard_normal(4).astype("float32") for key in "ab"}
    moved = sunk(make_program(transposed(operator), {"x": SHAPE}, weights), x)
    assert operators(moved) == [f"relax.nn.{name}", "relax.permute_dims"]


def test_batch_norm_keeps_its_channel_axis(rng):
    def build(bb, x, *statistics):
        transposed = bb.emit(OP.permute_dims(x, FIRST))
        norm = bb.emit(OP.nn.batch_norm(transposed, *statistics, axis=1, training=False))
        return bb.emit(relax.TupleGetItem(norm, 0))

    x = rng.standard_normal(SHAPE).astype("float32")
    weights = {key: rng.random(4).astype("float32") + 0.5 for key in ("g", "b", "m", "v")}
    program = make_program(build, {"x": SHAPE}, weights)
    moved = sink_transposes(program)
    assert operators(moved) == ["relax.nn.batch_norm", "relax.permute_dims"]
    g, b, m, v = weights.values()
    expected = ((x - m) / np.sqrt(v + 1e-5) * g + b).transpose(FIRST)
    np.testing.assert_allclose(run_program(fold_weights(moved), x), expected, rtol=1e-4, atol=1e-5)


def test_two_operands_with_the_same_transpose(rng):
    def build(bb, x, y):
        first, second = (bb.emit(OP.permute_dims(value, FIRST)) for value in (x, y))
        joined = bb.emit(OP.concat([first, second], axis=1))
        return bb.emit(OP.where(bb.emit(OP.greater(joined, relax.const(0.0))), joined, joined))

    x, y = (rng.standard_normal(SHAPE).astype("float32") for _ in range(2))
    moved = sunk(make_program(build, {"x": SHAPE, "y": SHAPE}, {}), x, y)
    assert operators(moved) == [
        "relax.concat", "relax.greater", "relax.where", "relax.permute_dims"
    ]  # fmt: skip


def test_sinks_through_split(rng):
    def build(bb, x):
        parts = bb.emit(OP.split(bb.emit(OP.permute_dims(x, FIRST)), [1], axis=1))
        return bb.emit(OP.add(*(bb.emit(relax.TupleGetItem(parts, i)) for i in range(2))))

    x = rng.standard_normal(SHAPE).astype("float32")
    moved = sunk(make_program(build, {"x": SHAPE}, {}), x)
    assert operators(moved) == ["relax.split", "relax.add", "relax.permute_dims"]


@pytest.mark.parametrize("shape", [(4, 1, 1), (1, 4, 3, 5), (5,), (3, 1), (1,)])
def test_weights_are_transposed_at_compile_time(shape, rng):
    x = rng.standard_normal(SHAPE).astype("float32")
    weights = {"w": rng.standard_normal(shape).astype("float32")}
    moved = sunk(make_program(transposed(OP.add), {"x": SHAPE}, weights), x)
    folded = fold_weights(moved)
    assert operators(folded) == ["relax.add", "relax.permute_dims"]


@pytest.mark.parametrize(
    ("shape", "free"),
    [((2, 4, 1, 1), True), ((1, 4, 1, 1), True), ((3, 5), True), ((5,), True), ((4, 3, 5), False)],
)
def test_computed_operands_are_reshaped_but_not_copied(shape, free, rng):
    def build(bb, x, y):
        return bb.emit(OP.multiply(bb.emit(OP.permute_dims(x, FIRST)), y))

    x, y = (rng.standard_normal(sizes).astype("float32") for sizes in (SHAPE, shape))
    moved = sunk(make_program(build, {"x": SHAPE, "y": shape}, {}), x, y)
    names = [name for name in operators(moved) if name != "relax.reshape"]
    expected = ["relax.multiply", "relax.permute_dims"]
    assert names == (expected if free else expected[::-1])


def test_transpose_with_two_readers_sinks_through_both(rng):
    def build(bb, x):
        value = bb.emit(OP.permute_dims(x, FIRST))
        return bb.emit(OP.add(bb.emit(OP.nn.gelu(value)), value))

    x = rng.standard_normal(SHAPE).astype("float32")
    moved = sunk(make_program(build, {"x": SHAPE}, {}), x)
    assert operators(moved) == ["relax.nn.gelu", "relax.add", "relax.permute_dims"]


def test_equal_transposes_are_emitted_once(rng):
    def build(bb, x):
        one, two = (bb.emit(OP.permute_dims(x, FIRST)) for _ in range(2))
        return bb.emit(OP.concat([bb.emit(OP.flip(one, 1)), bb.emit(OP.flip(two, 2))], axis=0))

    x = rng.standard_normal(SHAPE).astype("float32")
    moved = sunk(make_program(build, {"x": SHAPE}, {}), x)
    assert operators(moved) == [
        "relax.permute_dims", "relax.flip", "relax.flip", "relax.concat"
    ]  # fmt: skip


@pytest.mark.parametrize(
    "operator",
    [
        lambda x: OP.flip(x, 1),
        lambda x: OP.argmax(x, None),
        lambda x: OP.nn.adaptive_avg_pool2d(OP.permute_dims(x, [0, 1, 3, 2]), 2, layout="NHWC"),
    ],
    ids=["unknown", "counts in order", "another layout"],
)
def test_layout_dependent_operators_keep_their_transpose(operator, rng):
    x = rng.standard_normal(SHAPE).astype("float32")
    moved = sunk(make_program(transposed(operator), {"x": SHAPE}, {}), x)
    assert operators(moved)[0] == "relax.permute_dims"
    assert operators(moved).count("relax.permute_dims") == 1


def test_operands_with_different_transposes_keep_them(rng):
    def build(bb, x, y):
        first, second = OP.permute_dims(x, [2, 0, 1]), OP.permute_dims(y, [0, 2, 1])
        return bb.emit(OP.add(bb.emit(first), bb.emit(second)))

    x = rng.standard_normal((3, 5, 2)).astype("float32")
    y = rng.standard_normal((2, 5, 3)).astype("float32")
    moved = sunk(make_program(build, {"x": x.shape, "y": y.shape}, {}), x, y)
    assert operators(moved) == ["relax.permute_dims", "relax.permute_dims", "relax.add"]


def test_consecutive_transposes_are_merged(rng):
    def build(bb, x):
        value = bb.emit(OP.permute_dims(x, [0, 2, 1]))
        return bb.emit(OP.permute_dims(value, [2, 0, 1]))

    x = rng.standard_normal((2, 3, 4)).astype("float32")
    assert operators(sunk(make_program(build, {"x": x.shape}, {}), x)) == ["relax.permute_dims"]


def test_inverse_transposes_cancel(rng):
    def build(bb, x):
        value = bb.emit(OP.nn.relu(bb.emit(OP.permute_dims(x, FIRST))))
        return bb.emit(OP.permute_dims(value, [0, 2, 3, 1]))

    x = rng.standard_normal(SHAPE).astype("float32")
    assert operators(sunk(make_program(build, {"x": SHAPE}, {}), x)) == ["relax.nn.relu"]


@pytest.mark.parametrize("shape", [(2, 1, 1, 5), ("n", 1, 1, 5), (1, "h", 7, 1)])
def test_transpose_of_axes_of_size_one_becomes_a_reshape(shape):
    build = lambda bb, x: bb.emit(OP.permute_dims(x, FIRST))  # noqa: E731
    moved = sink_transposes(make_program(build, {"x": shape}, {}))
    assert operators(moved) == ["relax.reshape"]


def test_sinks_through_reshapes_between_pixels_and_tokens(rng):
    def build(bb, x):
        pixels = bb.emit(OP.permute_dims(x, FIRST))
        tokens = bb.emit(OP.permute_dims(bb.emit(OP.reshape(pixels, (2, 4, 15))), [0, 2, 1]))
        tokens = bb.emit(OP.nn.relu(tokens))
        pixels = bb.emit(OP.reshape(bb.emit(OP.permute_dims(tokens, [0, 2, 1])), (2, 4, 5, 3)))
        return bb.emit(OP.permute_dims(pixels, [0, 2, 3, 1]))

    x = rng.standard_normal(SHAPE).astype("float32")
    moved = sunk(make_program(build, {"x": SHAPE}, {}), x)
    assert operators(moved) == ["relax.reshape", "relax.nn.relu", "relax.reshape"]


def test_reshape_across_channels_and_pixels_keeps_the_transpose(rng):
    def build(bb, x):
        return bb.emit(OP.reshape(bb.emit(OP.permute_dims(x, FIRST)), (2, 12, 5)))

    x = rng.standard_normal(SHAPE).astype("float32")
    moved = sunk(make_program(build, {"x": SHAPE}, {}), x)
    assert operators(moved) == ["relax.permute_dims", "relax.reshape"]


@pytest.mark.parametrize("shape", [(2, 3), (2, "h")])
def test_consecutive_reshapes_are_merged(shape):
    def build(bb, x):
        height = x.ty.shape[1]
        value = bb.emit(OP.reshape(x, (height, 2)))
        value = bb.emit(OP.reshape(value, (2 * height,)))
        value = bb.emit(OP.reshape(value, (2 * height,)))
        back = bb.emit(OP.reshape(value, (2, height)))
        return bb.emit(relax.Tuple([value, back]))

    moved = sink_transposes(make_program(build, {"x": shape}, {}))
    assert operators(moved) == ["relax.reshape"]
