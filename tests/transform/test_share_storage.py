import numpy as np
import pytest
import tvm
from tvm import relax

from dcnv3_tvm.compiler import pipeline
from dcnv3_tvm.targets import resolve_target
from dcnv3_tvm.transform.legalize import LEGALIZATIONS
from dcnv3_tvm.transform.share_storage import share_storage
from helpers.programs import make_program


def build(bb, x):
    """Tensors of several sizes, one of which is read late and one through a view."""
    n = x.ty.shape[0]
    wide = bb.emit(relax.op.concat([x, x, x], axis=1))
    late = bb.emit(relax.op.sum(wide, axis=1, keepdims=True))
    flat = bb.emit(relax.op.reshape(wide, [n * 24]))
    pair = bb.emit(relax.op.concat([flat, flat], axis=0))
    narrow = bb.emit(relax.op.sum(relax.op.reshape(pair, [2, n, 24]), axis=2))
    turned = bb.emit(relax.op.permute_dims(narrow, [1, 0]))
    again = bb.emit(relax.op.concat([turned, late], axis=1))
    total = bb.emit(relax.op.sum(relax.op.reshape(flat, [n, 24]), axis=1, keepdims=True))
    return bb.emit(relax.op.concat([again, total], axis=1))


@pytest.fixture(scope="module")
def planned():
    program = make_program(build, {"x": ("n", 8)}, {})
    lowered = program.transformed(relax.transform.LegalizeOps(LEGALIZATIONS))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "share_storage", lambda function: function)
        return pipeline.plan_memory(lowered, resolve_target("auto"))[0]


def storages(function):
    return function.script().count("alloc_storage(")


def test_results_for_any_size(planned):
    shared = planned.clone()
    shared.update_func(shared.get_global_var("main"), share_storage(planned["main"]))
    assert storages(shared["main"]) < storages(planned["main"])
    executable = relax.build(shared, resolve_target("auto"), relax_pipeline=pipeline.lower_to_vm())
    machine = relax.VirtualMachine(executable, tvm.cpu())
    rng = np.random.default_rng(0)
    for n in (5, 1, 300):
        x = rng.standard_normal((n, 8), np.float32)
        total = 3 * x.astype(np.float64).sum(axis=1)
        result = machine["main"](tvm.runtime.tensor(x)).numpy()
        np.testing.assert_allclose(result, np.stack([total] * 4, axis=1), atol=1e-4)


def test_tensors_that_are_read_later_keep_their_storage(planned):
    """Between the binding of a tensor and the last read of it, its storage holds nothing else."""
    function = share_storage(planned["main"])
    held, owner = {}, {}
    for binding in function.body.blocks[0].bindings:
        value = binding.value
        if getattr(getattr(value, "op", None), "name", "") == "relax.memory.alloc_tensor":
            held[binding.var], owner[value.args[0]] = (binding.var, value.args[0]), binding.var
            continue
        arguments = value.args if isinstance(value, relax.Call) else [value]
        for argument in arguments:
            if argument in held:
                tensor, storage = held[argument]
                assert owner[storage] == tensor
                if not isinstance(getattr(value, "op", None), tvm.ir.GlobalVar):
                    held[binding.var] = held[argument]


def test_sizes_that_are_found_later_are_left_alone(planned):
    (block,) = planned["main"].body.blocks
    n = tvm.tirx.Var("m", "int64")
    x = planned["main"].params[0]
    ty = relax.TensorType([n, 8], "float32")
    cast = relax.MatchCast(relax.Var("cast", ty), x, ty)
    body = relax.SeqExpr([relax.BindingBlock([cast, *block.bindings])], planned["main"].body.body)
    function = relax.Function(planned["main"].params, body, planned["main"].ret_ty)
    assert share_storage(function).same_as(function)
