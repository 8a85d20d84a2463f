import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch

from dcnv3_tvm.errors import InvalidArgumentError
from dcnv3_tvm.frontend.onnx.export import express
from dcnv3_tvm.frontend.onnx.importer import import_onnx
from dcnv3_tvm.op.relax_call import params_of
from dcnv3_tvm.spec import DCNv3Params
from dcnv3_tvm.verify.tolerances import MODEL
from helpers.imported_models import dcnv3_calls, run_imported
from helpers.onnx_graphs import dcnv3_graph, expected, random_inputs

CASES = {
    "plain": DCNv3Params(group=2),
    "scaled": DCNv3Params(group=1, offset_scale=1.75),
    "strided": DCNv3Params(group=4, kernel_size=(5, 3), stride=(2, 1), pad=(2, 0)),
    "dilated": DCNv3Params(group=2, dilation=(1, 2), pad=(1, 2), offset_scale=0.5),
    "no center": DCNv3Params(group=2, remove_center=True, offset_scale=2.0),
    "even kernel": DCNv3Params(group=2, kernel_size=(2, 4), pad=1),
}


def _run(model, inputs):
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    content = ir.to_proto(model).SerializeToString()
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    return session.run(None, inputs)[0]


def _assert_close(result, reference):
    assert result.shape == reference.shape
    assert np.abs(result - reference).max() <= MODEL["float32"] * np.abs(reference).max()


@pytest.mark.parametrize("form", ["deform-conv", "grid-sample", "custom"])
@pytest.mark.parametrize("params", CASES.values(), ids=CASES)
@pytest.mark.parametrize("batch", [2, "n"])
def test_onnxruntime_computes_dcnv3(form, params, batch, rng):
    model = dcnv3_graph(params, rng=rng, batch=batch)
    inputs = random_inputs(model, rng)
    reference = expected(model, params, inputs)
    express(model, form)
    _assert_close(_run(model, inputs), reference)


@pytest.mark.parametrize("form", ["deform-conv", "grid-sample", "custom"])
@pytest.mark.parametrize("name", ["plain", "scaled", "dilated", "no center"])
def test_permutations_and_factors_are_folded_into_linear_layers(form, name, rng):
    # Offsets are computed from x, so strides and unequal sizes are left out.
    params = CASES[name]
    model = dcnv3_graph(params, rng=rng, linear=True)
    inputs = random_inputs(model, rng)
    reference = expected(model, params, inputs)
    express(model, form)
    if form != "custom" and not params.remove_center:
        assert "Gather" not in {node.op_type for node in model.graph}
    _assert_close(_run(model, inputs), reference)


@pytest.mark.parametrize("form", ["deform-conv", "grid-sample", "plugin", "custom"])
@pytest.mark.parametrize("name", CASES)
def test_import_finds_the_operator_again(form, name, rng):
    params = CASES[name]
    model = dcnv3_graph(params, rng=rng)
    express(model, form)
    imported = import_onnx(model)
    assert all(check.replaced for check in imported.report)
    (call,) = dcnv3_calls(imported)
    found = params_of(call)
    if form == "deform-conv":  # which folds the factor into the offsets, and adds a center
        assert (found.kernel_size, found.offset_scale) == (params.kernel_size, 1.0)
    else:
        assert found == params


@pytest.mark.parametrize("form", ["deform-conv", "grid-sample", "plugin"])
def test_imported_forms_compute_dcnv3(form, rng):
    params = CASES["scaled"]
    model = dcnv3_graph(params, rng=rng, linear=True)
    inputs = random_inputs(model, rng)
    reference = expected(model, params, inputs)
    express(model, form)
    imported = import_onnx(model)
    ((result,),) = run_imported(imported, torch.from_numpy(inputs["x"]))
    _assert_close(result, reference)


def test_grid_sample_needs_a_fixed_size(rng):
    model = dcnv3_graph(CASES["plain"], rng=rng)
    for value in model.graph.inputs:
        value.shape = ir.Shape(["n", "h", "w", value.shape[3]])
    with pytest.raises(InvalidArgumentError, match="needs a fixed image size"):
        express(model, "grid-sample")
