import numpy as np
import pytest
from tvm import relax

from helpers.programs import make_program, operators, run_program


def _keep(_rebuilder, _var, _call):
    return None


def test_rebuilding_without_changes(rng):
    weight = rng.standard_normal((4, 3)).astype("float32")
    x = rng.standard_normal((2, 4)).astype("float32")
    program = make_program(
        lambda bb, x, w: bb.emit(relax.op.nn.relu(bb.emit(relax.op.matmul(x, w)))),
        {"x": (2, 4)},
        {"w": weight},
    )
    rebuilt = program.rebuilt(_keep)
    relax.analysis.well_formed(rebuilt.module)
    assert operators(rebuilt) == ["relax.matmul", "relax.nn.relu"]
    np.testing.assert_allclose(run_program(rebuilt, x), np.maximum(x @ weight, 0), rtol=1e-5)


def test_dead_bindings_and_unused_weights_are_dropped(rng):
    def build(bb, x, used, unused):
        bb.emit(relax.op.add(x, unused))
        return bb.emit(relax.op.multiply(x, used))

    weights = {name: rng.standard_normal(4).astype("float32") for name in ("used", "unused")}
    rebuilt = make_program(build, {"x": (2, 4)}, weights).rebuilt(_keep)
    assert operators(rebuilt) == ["relax.multiply"]
    assert rebuilt.entries["main"].weights == ("used",)
    assert set(rebuilt.weights) == {"used"}
    assert len(rebuilt.module["main"].params) == 2


def test_symbolic_sizes_are_kept(rng):
    weight = rng.standard_normal((4, 3)).astype("float32")
    program = make_program(
        lambda bb, x, w: bb.emit(relax.op.matmul(x, w)), {"x": ("n", 4)}, {"w": weight}
    ).rebuilt(_keep)
    relax.analysis.well_formed(program.module)
    for rows in (1, 5):
        x = rng.standard_normal((rows, 4)).astype("float32")
        np.testing.assert_allclose(run_program(program, x), x @ weight, rtol=1e-4, atol=1e-5)


def test_equal_derived_weights_share_a_name():
    program = make_program(
        lambda bb, x, w: bb.emit(relax.op.add(x, w)),
        {"x": (4,)},
        {"w": np.zeros(4, "float32")},
    )
    names = []

    def visit(rebuilder, _var, call):
        parent = call.args[1]
        for value in (1, 1, 2):
            derived = rebuilder.weight(np.full(4, value, "float32"), parent, "half")
            names.append(derived.name)
        return rebuilder.emit(relax.op.add(call.args[0], derived))

    rebuilt = program.rebuilt(visit)
    assert names == ["w:half", "w:half", "w:half2"]
    assert rebuilt.entries["main"].weights == ("w:half2",)
    np.testing.assert_array_equal(rebuilt.weights["w:half2"], np.full(4, 2, "float32"))


@pytest.mark.parametrize("uses", [1, 2])
def test_only_use_rejects_a_value_with_two_readers(uses):
    def build(bb, x):
        inner = bb.emit(relax.op.nn.relu(x))
        other = inner if uses == 2 else x
        return bb.emit(relax.op.add(bb.emit(relax.op.nn.gelu(inner)), other))

    seen = []

    def visit(rebuilder, _var, call):
        if call.op.name == "relax.nn.gelu":
            seen.append(rebuilder.call(call.args[0], "relax.nn.relu", only_use=True) is not None)

    make_program(build, {"x": (4,)}, {}).rebuilt(visit)
    assert seen == [uses == 1]


def test_reads_of_replaced_variables_are_counted():
    def build(bb, x):
        inner = bb.emit(relax.op.nn.relu(x))
        same = bb.emit(relax.op.reshape(inner, (4,)))
        return bb.emit(relax.op.add(bb.emit(relax.op.nn.gelu(inner)), same))

    seen = []

    def visit(rebuilder, _var, call):
        if call.op.name == "relax.reshape":
            return call.args[0]
        if call.op.name == "relax.nn.gelu":
            seen.append(rebuilder.call(call.args[0], "relax.nn.relu", only_use=True))
        return None

    make_program(build, {"x": (4,)}, {}).rebuilt(visit)
    assert seen == [None]


def test_derived_weights_get_their_origins_name_unless_ambiguous(rng):
    weights = {
        name: rng.standard_normal(4).astype("float32") for name in ("a:packed", "b:half", "b:half2")
    }
    program = make_program(
        lambda bb, x, *values: bb.emit(relax.op.add(x, values[0])), {"x": (4,)}, weights
    ).with_plain_names()
    assert program.entries["main"].weights == ("a", "b:half", "b:half2")
    assert set(program.weights) == {"a", "b:half", "b:half2"}
    np.testing.assert_array_equal(program.weights["a"], weights["a:packed"])
