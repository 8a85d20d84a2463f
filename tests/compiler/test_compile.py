"""What `compile_model` and `compile_artifact` check, write and report."""

import dataclasses

import numpy as np
import pytest
from tvm import relax

import dcnv3_tvm as dt
from dcnv3_tvm import frontend, gpu, schedules
from dcnv3_tvm.compiler import compile as compiler
from dcnv3_tvm.compiler import pipeline
from dcnv3_tvm.errors import CompileError, InvalidArgumentError, TargetError
from dcnv3_tvm.frontend.models.variants import model_config
from dcnv3_tvm.imported_model import ImportedModel
from dcnv3_tvm.targets import resolve_target
from dcnv3_tvm.verify.random_weights import randomize_
from helpers.programs import make_program

NAME = "test_internimage_pre_norm"


@pytest.fixture(scope="module")
def model():
    return randomize_(frontend.create_model(NAME), seed=4)


@pytest.fixture(scope="module")
def imported(model):
    return frontend.import_model(model, example=(1, 3, 32, 32))


def test_debug_dump_holds_every_phase_and_the_import_is_unchanged(imported, rng, tmp_path):
    phases = []
    dump = tmp_path / "dump"
    image = rng.standard_normal((1, 3, 32, 32)).astype("float32")
    first = dt.compile_model(imported, debug_dump=dump, on_phase=phases.append)(image)
    expected = [f"{number:02d}-{name}.py" for number, name in enumerate(pipeline.PHASES)]
    assert sorted(path.name for path in dump.iterdir()) == expected
    assert phases == [*pipeline.PHASES, "build", "write"]
    assert "dcnv3_tvm.dcnv3" in (dump / expected[0]).read_text()
    np.testing.assert_array_equal(dt.compile_model(imported)(image), first)


def test_model_name_is_not_used_as_a_path(imported, tmp_path):
    compiled = dt.compile_model(dataclasses.replace(imported, name=str(tmp_path / "elsewhere")))
    assert compiled.metadata.name == str(tmp_path / "elsewhere")
    assert not any(tmp_path.iterdir())


def test_debug_dump_to_a_file(imported, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InvalidArgumentError, match=r"debug_dump; got .*file"):
        dt.compile_model(imported, debug_dump=tmp_path / "file")


def test_activation_bytes_grow_with_the_batch(model, imported):
    target = resolve_target("auto")
    batch_3 = frontend.import_model(model, example=(3, 3, 32, 32))
    one, three = (
        pipeline.plan_memory(pipeline.run_pipeline(found, target)[0], target)[1]
        for found in (imported, batch_3)
    )
    # At least the largest intermediate result, the output of the stem's first convolution.
    assert one["main"] >= 4 * 16 * 16 * model_config(NAME).channels // 2
    assert set(one) == set(three) == {"main", "features"}
    assert all(2 * one[entry] < three[entry] <= 3.5 * one[entry] for entry in one)


def test_artifact_for_another_cpu(imported, tmp_path):
    target = "llvm -mtriple=x86_64-linux-gnu -mcpu=haswell"
    metadata = dt.compile_artifact(imported, tmp_path / "haswell", target=target)
    assert metadata.target.mcpu == "haswell"
    assert "avx2" in metadata.target.features
    assert not any(feature.startswith("avx512") for feature in metadata.target.features)


@pytest.mark.parametrize("dtype", ["int8", "float128"])
def test_unsupported_dtype(imported, dtype):
    with pytest.raises(InvalidArgumentError, match="allowed: float32"):
        dt.compile_model(imported, dtype=dtype)


@pytest.mark.parametrize(
    ("target", "dtype", "message"),
    [
        ("cpu-znver4", "float16", "float32 and bfloat16 on CPUs; float16 on GPUs"),
        ("cpu-haswell", "bfloat16", "avx512_bf16.*float32"),
    ],
)
def test_dtype_not_supported_by_the_cpu(imported, tmp_path, target, dtype, message):
    with pytest.raises(TargetError, match=message):
        dt.compile_artifact(imported, tmp_path / "x", target=target, dtype=dtype)


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
