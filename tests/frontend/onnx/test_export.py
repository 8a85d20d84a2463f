import json

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import tvm_ffi
from tvm import tirx
from tvm.target import Target

from dcnv3_tvm import frontend
from dcnv3_tvm.cli import main
from dcnv3_tvm.compiler import pipeline
from dcnv3_tvm.errors import InvalidArgumentError, ModelExportError
from dcnv3_tvm.frontend.onnx import export
from dcnv3_tvm.frontend.onnx.compare import error_in_onnxruntime
from dcnv3_tvm.verify.random_weights import randomize_

SHAPE = (1, 3, 32, 32)


@pytest.fixture(scope="module")
def model():
    return randomize_(frontend.create_model("test_internimage_pre_norm"))


@pytest.fixture(scope="module")
def path(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("onnx") / "model.onnx"
    labels = [f"class {number}" for number in range(10)]
    frontend.export_onnx(model, path, example=SHAPE, dynamic_batch=True, labels=labels)
    return path


def test_the_file_is_valid_and_computes_the_model(model, path):
    onnx.checker.check_model(path, full_check=True)
    assert error_in_onnxruntime(path, model, (3, *SHAPE[1:])) < 1e-5


def test_large_weights_are_written_to_their_own_file(path, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "_MAX_INLINE_BYTES", 1000)
    written = tmp_path / "folder" / "large.onnx"
    export.write(ir.load(path), written)
    assert sorted(each.name for each in written.parent.iterdir()) == [
        "large.onnx",
        "large.onnx.data",
    ]
    onnx.checker.check_model(written)
    large, small = (ir.load(each).graph.initializers for each in (written, path))
    for name, value in small.items():
        np.testing.assert_array_equal(large[name].const_value, value.const_value)


def test_names_shapes_and_metadata(model, path):
    exported = ir.load(path)
    graph = exported.graph
    assert [value.name for value in (*graph.inputs, *graph.outputs)] == ["image", "logits"]
    assert list(graph.inputs[0].shape)[1:] == list(SHAPE[1:])
    assert graph.inputs[0].shape[0] == ir.SymbolicDim("n")
    known = set(graph.initializers)
    assert {"patch_embed.conv1.weight", "levels.0.blocks.0.dcn.offset.weight"} <= known
    assert json.loads(exported.metadata_props["labels"])[3] == "class 3"
    assert json.loads(exported.metadata_props["preprocessing"]) == model.config.preprocessing


def test_the_import_has_the_kernels_of_the_direct_one(model, path):
    direct = frontend.import_model(model, example=SHAPE, dynamic_batch=True, features="never")
    imported = frontend.import_onnx(path)
    assert imported.labels[9] == "class 9"
    assert imported.preprocessing["mean"] == direct.preprocessing["mean"]
    target = Target({"kind": "llvm", "mcpu": "x86-64-v3"})
    expected, kernels = (_kernels(model, target) for model in (direct, imported))
    assert kernels.keys() == expected.keys()
    for name, kernel in kernels.items():
        assert tvm_ffi.structural_equal(kernel, expected[name], map_free_vars=True), name


def _kernels(imported, target):
    program, _ = pipeline.run_pipeline(imported, target)
    return {
        var.name_hint: function.without_attr("global_symbol")
        for var, function in program.module.functions_items()
        if isinstance(function, tirx.PrimFunc)
    }


def test_another_model_is_told_apart(path):
    other = randomize_(frontend.create_model("test_internimage_pre_norm"), seed=1)
    with pytest.raises(ModelExportError, match="something else than the model"):
        error_in_onnxruntime(path, other, SHAPE)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"form": "tflite"}, "unknown form"), ({"opset": 11}, "unsupported operator set")],
)
def test_invalid_arguments(model, options, message, tmp_path):
    with pytest.raises(InvalidArgumentError, match=message):
        frontend.export_onnx(model, tmp_path / "model.onnx", example=SHAPE, **options)


@pytest.mark.usefixtures("unoptimized")
def test_command_line(tmp_path, capsys):
    out = tmp_path / "model.onnx"
    options = ["--random-weights", "0", "--size", "32", "--form", "plugin", "--features-only"]
    options += ["-o", str(out)]
    assert main(["export", "test_internimage_pre_norm", *options]) == 0
    assert "the plugin runs in TensorRT" in capsys.readouterr().out
    graph = ir.load(out).graph
    assert {node.op_type for node in graph} >= {"TRTDCNv3"}
    assert [value.name for value in graph.outputs] == [f"feature_{stage}" for stage in range(4)]
    assert main(["export", "test_internimage_pre_norm", *options]) == 2
    assert "the file exists" in capsys.readouterr().err
    compiled = ["compile", str(out), "-o", str(tmp_path / "artifact"), "--features-only"]
    assert main(compiled) == 2
    assert "an ONNX file has its weights" in capsys.readouterr().err
    assert main(compiled[:-1]) == 0
    assert "model for" in capsys.readouterr().out
