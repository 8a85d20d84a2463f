import contextlib
import io
import logging
import warnings

import numpy as np
import onnx_ir as ir
import pytest
import torch
from onnx_ir.tape import Tape
from torch import nn
from tvm import relax

from dcnv3_tvm.compiler.compile import compile_model
from dcnv3_tvm.errors import DCNv3Error, InvalidArgumentError, ModelImportError
from dcnv3_tvm.frontend.onnx.export import express
from dcnv3_tvm.frontend.onnx.fuse import fuse
from dcnv3_tvm.frontend.onnx.importer import import_onnx
from dcnv3_tvm.frontend.onnx.recognize import recognize
from dcnv3_tvm.op.relax_call import params_of
from dcnv3_tvm.spec import DCNv3Params
from helpers import published_style_models as published
from helpers.imported_models import (
    assert_close,
    count_dcnv3,
    dcnv3_calls,
    run_imported,
    run_pytorch,
)
from helpers.onnx_graphs import dcnv3_graph, random_inputs

SHAPE = (2, 3, 16, 12)


def _export(model, path, *, dynamo, opset, **options):
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        image = torch.randn(SHAPE)
        options |= {"input_names": ["image"], "opset_version": opset, "dynamo": dynamo}
        if dynamo:
            options["verbose"] = False
        torch.onnx.export(model, (image,), path, **options)


@pytest.fixture(scope="module")
def classifier():
    return published.randomised(published.Classifier(published.DCNv3Pytorch)).eval()


@pytest.mark.parametrize(("dynamo", "opset"), [(False, 16), (True, 20)], ids=["script", "dynamo"])
def test_decomposed_operators_are_recognized(classifier, dynamo, opset, tmp_path):
    path = tmp_path / "model.onnx"
    _export(classifier, path, dynamo=dynamo, opset=opset)
    imported = import_onnx(path)
    assert len(imported.report) == count_dcnv3(imported) > 0
    assert all(check.replaced and check.error < 1e-4 for check in imported.report)
    assert not _operators(imported) & {"relax.image.grid_sample", "relax.erf", "relax.sqrt"}
    image = torch.randn(SHAPE)
    (outputs,) = run_imported(imported, image)
    assert_close(outputs, [run_pytorch(classifier, image)])


def _operators(imported):
    return {
        getattr(binding.value.op, "name", "")
        for block in imported.module["main"].body.blocks
        for binding in block.bindings
        if isinstance(binding.value, relax.Call)
    }


def test_other_samplings_stay_and_are_reported(rng):
    model = dcnv3_graph(DCNv3Params(group=2), rng=rng)
    express(model, "grid-sample")
    (node,) = [node for node in model.graph if node.op_type == "GridSample"]
    node.attributes["align_corners"] = ir.AttrInt64("align_corners", 1)
    (check,) = recognize(model.graph)
    assert not check.replaced
    assert "align_corners" in check.reason


def test_deform_conv_with_filters_is_rejected(rng):
    model = dcnv3_graph(DCNv3Params(group=2), rng=rng)
    express(model, "deform-conv")
    (node,) = [node for node in model.graph if node.op_type == "DeformConv"]
    weight = node.inputs[1]
    weight.const_value = ir.tensor(2 * weight.const_value.numpy(), name=weight.name)
    with pytest.raises(ModelImportError, match="its filters are not ones"):
        recognize(model.graph)


def _with_output(model, op_type, *operands, **attributes):
    """Add an operator of the output, with constants as numbers, as a further output."""
    tape = Tape()
    constants = [tape.op("Constant", [], each) for each in operands]
    (y, *_) = model.graph.outputs
    source = y if op_type == "Resize" else tape.op("Cast", [y], {"to": ir.DataType.INT64})
    places = [None] * (op_type == "Resize")
    result = tape.op(op_type, [source, *places, *constants], attributes)
    result.name = op_type
    model.graph.extend(tape.nodes)
    model.graph.outputs.append(result)


def test_powers_of_integers_and_constants_as_numbers(rng):
    model = dcnv3_graph(DCNv3Params(group=2), rng=rng)
    _with_output(model, "Pow", {"value_int": 2})
    _with_output(model, "Resize", {"value_floats": [1.0, 1.0, 2.0, 1.0]})
    inputs = random_inputs(model, rng)
    compiled = compile_model(import_onnx(model))
    y, power, resized = compiled(*inputs.values()).values()
    np.testing.assert_array_equal(power, y.astype("int64") ** 2)
    assert resized.shape == (2, 7, 18, 8)


@pytest.mark.parametrize(("scale", "antialias"), [(1.5, 0), (2.0, 1)])
def test_resizes_that_tvm_computes_otherwise_are_rejected(scale, antialias, rng):
    model = dcnv3_graph(DCNv3Params(group=2), rng=rng)
    scales = {"value_floats": [1.0, 1.0, scale, 1.0]}
    _with_output(model, "Resize", scales, mode="linear", antialias=antialias)
    with pytest.raises(ModelImportError, match=r"Resize.*got (size 9 by scale 1\.5|antialias)"):
        import_onnx(model)


def test_half_precision_becomes_float32(rng):
    model = dcnv3_graph(DCNv3Params(group=2), rng=rng, linear=True)
    for value in model.graph.initializers.values():
        if value.dtype == ir.DataType.FLOAT:
            value.const_value = ir.tensor(value.const_value.numpy().astype("float16"))
            value.type = ir.TensorType(ir.DataType.FLOAT16)
    for value in (*model.graph.inputs, *model.graph.outputs):
        value.type = ir.TensorType(ir.DataType.FLOAT16)
    imported = import_onnx(model)
    assert imported.entries["main"].inputs[0].dtype == "float32"
    assert {str(array.dtype) for array in imported.weights.values()} == {"float32"}


def test_a_dynamic_batch_keeps_its_name(rng):
    model = dcnv3_graph(DCNv3Params(group=2), rng=rng, linear=True, batch="frames")
    imported = import_onnx(model)
    assert imported.entries["main"].outputs[0].shape == ("frames", 7, 9, 8)
    fixed = import_onnx(model, shapes={"x": (1, 7, 9, 8)})
    assert fixed.entries["main"].outputs[0].shape == (1, 7, 9, 8)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({"y": (1, 2)}, "does not have"),
        ({"x": (1, 2)}, "another number of axes"),
        ({"x": ("n", 7, 9, 8)}, "cannot become dynamic"),
    ],
)
def test_invalid_shapes(shapes, message, rng):
    model = dcnv3_graph(DCNv3Params(group=2), rng=rng, linear=True)
    with pytest.raises(InvalidArgumentError, match=message):
        import_onnx(model, shapes=shapes)


def test_a_graph_without_dcnv3_is_rejected():
    tape = Tape()
    x = ir.val("x", dtype=ir.DataType.FLOAT, shape=(2, 3))
    y = tape.op("Relu", [x])
    y.name, y.type, y.shape = "y", x.type, x.shape
    graph = ir.Graph([x], [y], nodes=tape.nodes, opset_imports={"": 20}, name="relu")
    with pytest.raises(ModelImportError, match="contains no DCNv3"):
        import_onnx(ir.Model(graph, ir_version=10))


class Decomposed(nn.Module):
    """GELU and LayerNorm as TorchScript's exporter writes them for old operator sets."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(8, eps=1e-5)

    def forward(self, x):
        return nn.functional.gelu(self.norm(x))


def test_gelu_and_layer_norm_are_fused(tmp_path):
    path = tmp_path / "model.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            Decomposed(), (torch.randn(2, 3, 8),), path, opset_version=16, dynamo=False
        )
    model = ir.load(path)
    fuse(model.graph)
    assert [node.op_type for node in model.graph] == ["LayerNormalization", "Gelu"]
    assert model.graph[0].attributes["epsilon"].value == pytest.approx(1e-5)


def test_mutated_files_end_in_errors_of_this_library(rng, tmp_path):
    model = dcnv3_graph(DCNv3Params(group=2), rng=rng, linear=True)
    content = ir.to_proto(model).SerializeToString()
    path = tmp_path / "model.onnx"
    failed = 0
    for _ in range(40):
        changed = bytearray(content)
        if rng.random() < 0.3:
            del changed[rng.integers(len(changed)) :]
        for _ in range(rng.integers(1, 6)):
            if changed:
                changed[rng.integers(len(changed))] = rng.integers(256)
        path.write_bytes(bytes(changed))
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                import_onnx(path)
        except DCNv3Error:
            failed += 1
    assert failed > 10


def test_nodes_that_are_missing_or_of_wrong_types_are_named(rng):
    model = dcnv3_graph(DCNv3Params(group=2), rng=rng)
    express(model, "plugin")
    (node,) = [node for node in model.graph if node.op_type == "TRTDCNv3"]
    node.attributes["group"] = ir.AttrString("group", "two")
    with pytest.raises(ModelImportError, match="attributes of the node"):
        import_onnx(model)


def test_shapes_after_the_plugin_are_inferred(rng):
    model = dcnv3_graph(DCNv3Params(group=2, stride=2), rng=rng)
    express(model, "plugin")
    (result,) = model.graph.outputs
    tape = Tape()
    doubled = tape.op("Add", [result, result])
    doubled.type = result.type
    model.graph.extend(tape.nodes)
    model.graph.outputs[0] = doubled
    result.shape = doubled.shape = None
    doubled.name = "doubled"
    imported = import_onnx(model)
    (output,) = imported.entries["main"].outputs
    assert (output.name, output.shape) == ("doubled", (2, 4, 5, 8))


def test_the_plugin_for_grid_sample(rng):
    params = DCNv3Params(group=2)
    model = dcnv3_graph(params, rng=rng)
    express(model, "grid-sample")
    (node,) = [node for node in model.graph if node.op_type == "GridSample"]
    node.domain, node.op_type = "mmdeploy", "grid_sampler"
    node.attributes.clear()
    for name in ("interpolation_mode", "padding_mode", "align_corners"):
        node.attributes[name] = ir.AttrInt64(name, 0)
    imported = import_onnx(model)
    (call,) = dcnv3_calls(imported)
    assert params_of(call) == params
