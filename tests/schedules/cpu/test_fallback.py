import numpy as np
import pytest
import tvm
from tvm import relax, tirx
from tvm.script import tirx as T

from dcnv3_tvm.schedules import SCHEDULED, UNSCHEDULED, schedule, schedule_module
from helpers.structure import loop_kinds

CASES = {
    "add": (lambda x, y: relax.op.add(x, y), np.add, [(2, 9, 9, 64), (64,)]),
    "relu_of_add": (
        lambda x, y: relax.op.nn.relu(relax.op.add(x, y)),
        lambda x, y: np.maximum(x + y, 0),
        [(3, 40, 50, 16), (3, 40, 50, 16)],
    ),
    "mean_of_pixels": (
        lambda x: relax.op.mean(x, [1, 2]),
        lambda x: x.mean((1, 2)),
        [(2, 13, 13, 300)],
    ),
    "mean_of_channels": (lambda x: relax.op.mean(x, [-1]), lambda x: x.mean(-1), [(40, 50, 60)]),
    "sum_to_a_scalar": (relax.op.sum, np.sum, [(3, 5)]),
    "matmul": (relax.op.matmul, np.matmul, [(4, 19, 33), (4, 33, 48)]),
    "transpose": (
        lambda x: relax.op.permute_dims(x, [0, 2, 3, 1]),
        lambda x: x.transpose(0, 2, 3, 1),
        [(1, 48, 40, 41)],
    ),
    "concatenation": (
        lambda x, y: relax.op.concat([x, y], -1),
        lambda x, y: np.concatenate([x, y], -1),
        [(5, 64), (5, 7)],
    ),
}


def legalized(build, shapes):
    """Return the TensorIR functions of one Relax operation."""
    builder = relax.BlockBuilder()
    names = [relax.Var(f"x{i}", relax.TensorType(s, "float32")) for i, s in enumerate(shapes)]
    with builder.function("main", names):
        with builder.dataflow():
            result = builder.emit_output(builder.emit(build(*names)))
        builder.emit_func_output(result)
    return relax.transform.FuseTIR()(
        relax.transform.FuseOps()(
            relax.transform.AnnotateTIROpPattern()(relax.transform.LegalizeOps()(builder.get()))
        )
    )


def kernels(module):
    return [func for func in module.functions.values() if isinstance(func, tirx.PrimFunc)]


@pytest.mark.parametrize("name", CASES)
def test_stock_operators(rng, host, assert_close, name):
    build, reference, shapes = CASES[name]
    module, rules = schedule_module(legalized(build, shapes), host)
    assert {found.rule for found in rules.values()} == {"fallback"}
    arrays = [rng.standard_normal(shape).astype("float32") for shape in shapes]
    machine = relax.VirtualMachine(tvm.compile(module, target=host), tvm.cpu())
    result = machine["main"](*map(tvm.runtime.tensor, arrays)).numpy()
    assert_close(result, reference(*(array.astype("float64") for array in arrays)))


def test_softmax(rng, host, assert_close):
    module, _ = schedule_module(legalized(relax.op.nn.softmax, [(50, 30, 17)]), host)
    x = rng.standard_normal((50, 30, 17)).astype("float32")
    machine = relax.VirtualMachine(tvm.compile(module, target=host), tvm.cpu())
    power = np.exp(x.astype("float64"))
    result = machine["main"](tvm.runtime.tensor(x)).numpy()
    assert_close(result, power / power.sum(-1, keepdims=True))


def test_large_kernels_run_in_parallel_and_in_vectors(host):
    (func,) = kernels(legalized(CASES["relu_of_add"][0], [(64, 4096)] * 2))
    assert {"PARALLEL", "VECTORIZED"} <= loop_kinds(schedule(func, host).function)


def test_small_kernels_start_no_threads(host):
    (func,) = kernels(legalized(CASES["add"][0], [(2, 64), (64,)]))
    assert "PARALLEL" not in loop_kinds(schedule(func, host).function)


def test_dynamic_sizes(rng, host, assert_close):
    n = tirx.Var("n", "int64")
    module, _ = schedule_module(legalized(relax.op.nn.relu, [(n, 7, 32)]), host)
    x = rng.standard_normal((3, 7, 32)).astype("float32")
    machine = relax.VirtualMachine(tvm.compile(module, target=host), tvm.cpu())
    assert_close(machine["main"](tvm.runtime.tensor(x)).numpy(), np.maximum(x, 0))


def test_opaque_block_is_left_unchanged(host):
    @T.prim_func(s_tir=True)
    def scan(x: T.Buffer((8,), "float32"), out: T.Buffer((8,), "float32")):
        with T.sblock("scan"):
            T.reads(x[0:8])
            T.writes(out[0:8])
            out[0] = x[0]
            for i in range(7):
                out[i + 1] = out[i] + x[i + 1]

    module = tvm.IRModule({"main": scan})
    module, rules = schedule_module(module, host)
    out = tvm.runtime.tensor(np.full(8, np.nan, "float32"))
    tvm.compile(module, target=host)["main"](tvm.runtime.tensor(np.ones(8, "float32")), out)
    assert (out.numpy() == np.arange(1, 9)).all()
    assert rules["main"].rule in ("fallback", UNSCHEDULED)


def test_scheduling_is_deterministic_and_idempotent(host):
    module = legalized(CASES["mean_of_pixels"][0], [(2, 13, 13, 300)])
    first, rules = schedule_module(module, host)
    second, _ = schedule_module(module, host)
    tvm.ir.assert_structural_equal(first, second)
    again, nothing = schedule_module(first, host)
    tvm.ir.assert_structural_equal(first, again)
    assert rules
    assert not nothing
    assert all(func.attrs[SCHEDULED] for func in kernels(first))
