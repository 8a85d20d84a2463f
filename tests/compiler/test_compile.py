"""What `compile_model` and `compile_artifact` check, write and report."""

import dataclasses
from contextlib import nullcontext

import numpy as np
import pytest
import torch
import tvm
from torch import nn
from tvm import relax

import dcnv3_tvm as dt
from dcnv3_tvm import frontend, gpu, schedules
from dcnv3_tvm.compiler import compile as compiler
from dcnv3_tvm.compiler import pipeline
from dcnv3_tvm.errors import CompileError, DCNv3Warning, InvalidArgumentError, TargetError
from dcnv3_tvm.frontend.models.internimage import DCNv3
from dcnv3_tvm.imported_model import ImportedModel
from dcnv3_tvm.targets import resolve_target
from dcnv3_tvm.verify.random_weights import randomize_
from helpers.programs import make_program

CHANNELS = 16


class Small(nn.Module):
    """A strided convolution and DCNv3: compiled in a second or two."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, CHANNELS, 3, stride=2, padding=1)
        self.dcn = DCNv3(CHANNELS, group=2)

    def forward(self, image):
        x = torch.relu(self.stem(image)).permute(0, 2, 3, 1)
        return (x + self.dcn(x)).permute(0, 3, 1, 2)


@pytest.fixture(scope="module")
def model():
    return randomize_(Small().eval(), seed=4)


@pytest.fixture(scope="module")
def imported(model):
    return frontend.import_model(model, example=(1, 3, 32, 32))


def test_debug_dump_holds_every_phase(imported, tmp_path):
    phases = []
    dump = tmp_path / "dump"
    before = tvm.IRModule(dict(imported.module.functions_items()))
    weights = {name: array.copy() for name, array in imported.weights.items()}
    # The name of a model is not a path.
    named = dataclasses.replace(imported, name=str(tmp_path / "elsewhere"))
    compiled = dt.compile_model(named, debug_dump=dump, on_phase=phases.append)
    assert compiled.metadata.name == str(tmp_path / "elsewhere")
    assert list(tmp_path.iterdir()) == [dump]
    expected = [f"{number:02d}-{name}.py" for number, name in enumerate(pipeline.PHASES)]
    assert sorted(path.name for path in dump.iterdir()) == expected
    assert phases == [*pipeline.PHASES, "build", "write"]
    assert "dcnv3_tvm.dcnv3" in (dump / expected[0]).read_text()
    # The import can be compiled again.
    tvm.ir.assert_structural_equal(imported.module, before)
    np.testing.assert_equal(imported.weights, weights)


def test_debug_dump_to_a_file(imported, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InvalidArgumentError, match=r"debug_dump; got .*file"):
        dt.compile_model(imported, debug_dump=tmp_path / "file")
    with pytest.raises(InvalidArgumentError, match=r"debug_dump is inside .*artifact, which"):
        dt.compile_artifact(imported, tmp_path / "artifact", debug_dump=tmp_path / "artifact" / "d")


def test_activation_bytes_grow_with_the_batch(model, imported):
    target = resolve_target("auto")
    batch_3 = frontend.import_model(model, example=(3, 3, 32, 32))
    one, three = (
        pipeline.plan_memory(pipeline.run_pipeline(found, target)[0], target)[1]
        for found in (imported, batch_3)
    )
    assert set(one) == set(three) == {"main"}
    # At least one intermediate result of the convolution's size.
    assert one["main"] >= 4 * 16 * 16 * CHANNELS
    assert 2 * one["main"] < three["main"] <= 3.5 * one["main"]


def test_artifact_for_another_cpu(imported, tmp_path):
    target = "llvm -mtriple=x86_64-linux-gnu -mcpu=haswell"
    with pytest.warns(DCNv3Warning, match="float32"):
        metadata = dt.compile_artifact(imported, tmp_path / "x", target=target, dtype="bfloat16")
    assert metadata.dtype == "float32"
    assert metadata.target.mcpu == "haswell"
    assert "avx2" in metadata.target.features
    assert not any(feature.startswith("avx512") for feature in metadata.target.features)


def test_model_for_another_system(imported):
    with pytest.raises(TargetError, match=r"got macos-arm64-apple-m1; .*compile_artifact"):
        dt.compile_model(imported, target="macos-arm64")


@pytest.mark.parametrize("dtype", ["int8", "float128"])
def test_unsupported_dtype(imported, dtype):
    with pytest.raises(InvalidArgumentError, match="allowed: float32"):
        dt.compile_model(imported, dtype=dtype)


@pytest.mark.parametrize(
    ("target", "dtype", "effective"),
    [
        ("cpu-haswell", "bfloat16", "float32"),
        ("llvm -mcpu=sapphirerapids -mattr=-amx-bf16", "bfloat16", "float32"),
        ("cpu-graniterapids", "bfloat16", "bfloat16"),
        ("cpu-cooperlake", "bfloat16", "bfloat16"),
        ("cpu-znver4", "bfloat16", "bfloat16"),
        ("cuda-sm80", "bfloat16", "bfloat16"),
        ("cuda-sm80", "float16", "float16"),
    ],
)
def test_element_type_by_target(target, dtype, effective):
    gains = effective == dtype
    with nullcontext() if gains else pytest.warns(DCNv3Warning, match="gains nothing on cpu-"):
        assert compiler.effective_dtype(dtype, resolve_target(target)) == effective


@pytest.mark.parametrize("target", ["cpu-znver4", "cpu-graniterapids"])
def test_float16_on_cpus(target):
    with pytest.raises(TargetError, match="float32 and bfloat16 on CPUs; float16 on GPUs"):
        compiler.effective_dtype("float16", resolve_target(target))


@pytest.mark.skipif(bool(gpu.devices()), reason="needs a machine without a GPU")
@pytest.mark.parametrize("dtype", compiler.DTYPES)
def test_compile_model_for_an_absent_gpu_fails_before_scheduling(imported, monkeypatch, dtype):
    def fail(*_):
        pytest.fail("the model was scheduled")

    monkeypatch.setattr(schedules, "schedule_module", fail)
    with pytest.raises(TargetError, match=r"this machine has none.*--target auto"):
        dt.compile_model(imported, target="cuda-sm90", dtype=dtype)


@pytest.mark.parametrize(
    ("target", "dtype"), [("auto", "float32"), ("cuda-sm90", "float16"), ("cuda-sm90", "bfloat16")]
)
def test_shape_unknown_at_compile_time(target, dtype):
    def build(bb, x, y):
        return bb.emit(relax.op.permute_dims(bb.emit(relax.op.add(x, y)), [1, 0]))

    program = make_program(build, {"x": ("n", 4), "y": ("m", 4)}, {})
    imported = ImportedModel("toy", program.module, program.entries, program.weights)
    with pytest.raises(CompileError, match=r"relax\.add in main.* fixed image size"):
        pipeline.run_pipeline(imported, resolve_target(target), dtype=dtype)
