"""Whole encoders against PyTorch in float64 with the reference as operator."""

import dataclasses
import functools

import numpy as np
import pytest
from tvm import relax

import dcnv3_tvm as dt
from dcnv3_tvm import frontend, machine
from dcnv3_tvm.compiler import pipeline
from dcnv3_tvm.errors import CompileError, InvalidArgumentError, TargetError
from dcnv3_tvm.frontend.models.variants import model_config
from dcnv3_tvm.imported_model import ImportedModel
from dcnv3_tvm.targets import resolve_target
from dcnv3_tvm.verify.compare import compare, reference_outputs
from dcnv3_tvm.verify.random_weights import randomize_
from helpers.programs import make_program

TINY = frontend.list_models("test_internimage_*")
CLIP = [name for name in TINY if model_config(name).clip_projector]
POOLED = [name for name in TINY if name not in CLIP]
# Importing and compiling open sizes takes longest: one variant of each head shows it.
OPEN = [POOLED[0], CLIP[0]]

DOT_PRODUCT = pytest.mark.skipif(
    "avx512bf16" in machine.missing_features(["avx512bf16"]),
    reason="this processor multiplies no bfloat16",
)


@functools.lru_cache(maxsize=2)
def _problem(name, shape):
    """Make a model, its import, an image and the truth, which all dtypes share."""
    model = randomize_(frontend.create_model(name), seed=1)
    image = np.random.default_rng(20260801).standard_normal(shape).astype("float32")
    truth = reference_outputs(model, image)
    return model, frontend.import_model(model, example=shape), image, truth


@pytest.fixture(scope="module")
def small():
    """Return the import of one small model, which no compilation changes."""
    model = randomize_(frontend.create_model(TINY[0]), seed=4)
    return frontend.import_model(model, example=(1, 3, 32, 32))


def _assert_agrees(compiled, model, image, truth=None):
    differences = compare(compiled, model, image, truth)
    assert len(differences) == 1 + 4
    assert [d for d in differences if not d.within(compiled.metadata.dtype)] == []
    # A model whose weights do nothing would agree with anything.
    assert all(d.scale > 1e-2 for d in differences)


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=DOT_PRODUCT)])
@pytest.mark.parametrize("name", TINY)
def test_every_block_path_and_head(name, dtype):
    model, imported, image, truth = _problem(name, (2, 3, 64, 96))
    compiled = dt.compile_model(imported, dtype=dtype)
    rules = list(compiled.metadata.kernels.values())
    assert "unscheduled" not in rules
    if dtype == "bfloat16":
        # One a stage: those that stored float32 are gone.
        assert rules.count("dcnv3") == 4
        assert {tensor.dtype for tensor in compiled.metadata.entries["main"].outputs} == {"float32"}
    _assert_agrees(compiled, model, image, truth)


def _images(rng, *shapes):
    return [rng.standard_normal(shape).astype("float32") for shape in shapes]


@pytest.mark.parametrize("name", OPEN)
def test_any_batch(name, rng):
    model = randomize_(frontend.create_model(name), seed=2)
    imported = frontend.import_model(model, example=(1, 3, 64, 32), dynamic_batch=True)
    compiled = dt.compile_model(imported)
    assert compiled.metadata.activation_bytes == {}
    for image in _images(rng, (1, 3, 64, 32), (5, 3, 64, 32)):
        _assert_agrees(compiled, model, image)


def test_any_size(rng):
    model = randomize_(frontend.create_model(POOLED[-1]), seed=3)
    imported = frontend.import_model(
        model, example=(1, 3, 64, 96), dynamic_batch=True, dynamic_size=True
    )
    compiled = dt.compile_model(imported)
    for image in _images(rng, (1, 3, 64, 96), (2, 3, 75, 131), (1, 3, 33, 40)):
        _assert_agrees(compiled, model, image)


@pytest.mark.parametrize(
    ("target", "dtype"), [("auto", "float32"), ("cuda-sm90", "float16"), ("cuda-sm90", "bfloat16")]
)
def test_a_shape_that_is_unknown_before_run_time_is_refused_with_words(target, dtype):
    def build(bb, x, y):
        return bb.emit(relax.op.permute_dims(bb.emit(relax.op.add(x, y)), [1, 0]))

    program = make_program(build, {"x": ("n", 4), "y": ("m", 4)}, {})
    imported = ImportedModel("toy", program.module, program.entries, program.weights)
    with pytest.raises(CompileError, match=r"relax\.add in main.* fixed image size"):
        pipeline.run_pipeline(imported, resolve_target(target), dtype=dtype)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "batch", "dtype"),
    [
        ("internimage_t", 3, "float32"),
        pytest.param("internimage_t", 1, "bfloat16", marks=DOT_PRODUCT),
        ("internimage_b", 1, "float32"),
    ],
)
def test_released_variants(name, batch, dtype):
    model, imported, image, truth = _problem(name, (batch, 3, 224, 224))
    compiled = dt.compile_model(imported, dtype=dtype)
    if dtype == "float32":
        # Pooling, and the layout of the input and of the feature maps, are all that is not ours.
        others = [name for name, rule in compiled.metadata.kernels.items() if rule == "fallback"]
        assert len(others) <= 8
    _assert_agrees(compiled, model, image, truth)


def test_bfloat16_for_a_processor_without_it_is_refused_with_words(small):
    with pytest.raises(TargetError, match=r"avx512_bf16.*float32"):
        dt.compile_model(small, target="cpu-haswell", dtype="bfloat16")


def test_compiling_leaves_the_import_as_it_was_and_dumps_every_phase(small, rng, tmp_path):
    phases = []
    dump = tmp_path / "dump"
    image = rng.standard_normal((1, 3, 32, 32)).astype("float32")
    first = dt.compile_model(small, debug_dump=dump, on_phase=phases.append)(image)
    expected = [f"{number:02d}-{name}.py" for number, name in enumerate(pipeline.PHASES)]
    assert sorted(path.name for path in dump.iterdir()) == expected
    assert phases[: len(pipeline.PHASES)] == list(pipeline.PHASES)
    assert "dcnv3_tvm.dcnv3" in (dump / expected[0]).read_text()
    np.testing.assert_array_equal(dt.compile_model(small)(image), first)


def test_what_a_model_is_called_is_no_path(small, tmp_path):
    compiled = dt.compile_model(dataclasses.replace(small, name=str(tmp_path / "elsewhere")))
    assert compiled.metadata.name == str(tmp_path / "elsewhere")
    assert not any(tmp_path.iterdir())


def test_a_dump_that_cannot_be_written_is_refused_with_words(small, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InvalidArgumentError, match=r"where debug_dump says; got .*file"):
        dt.compile_model(small, debug_dump=tmp_path / "file")


def test_the_memory_of_a_call_is_known_where_the_sizes_are():
    model = frontend.create_model(POOLED[0])
    target = resolve_target("auto")
    imports = [frontend.import_model(model, example=(batch, 3, 32, 32)) for batch in (1, 3)]
    one, three = (
        pipeline.plan_memory(pipeline.run_pipeline(imported, target)[0], target)[1]
        for imported in imports
    )
    # At least the largest result: what the first convolution of the stem makes.
    assert one["main"] >= 4 * 16 * 16 * model_config(POOLED[0]).channels // 2
    assert set(one) == set(three) == {"main", "features"}
    assert all(2 * one[entry] < three[entry] <= 3.5 * one[entry] for entry in one)
    # Where only the run time knows them: test_any_batch.
    assert dt.compile_model(imports[0]).metadata.activation_bytes == one


@pytest.mark.parametrize("dtype", ["float16", "int8", "float128"])
def test_an_unknown_dtype_is_refused(small, dtype):
    with pytest.raises(ValueError, match="allowed: float32"):
        dt.compile_model(small, dtype=dtype)


def test_a_foreign_target_is_written_and_not_loaded(small, tmp_path):
    target = "llvm -mtriple=x86_64-linux-gnu -mcpu=haswell"
    metadata = dt.compile_artifact(small, tmp_path / "haswell", target=target)
    assert metadata.target.mcpu == "haswell"
    assert "avx2" in metadata.target.features
    assert not any(feature.startswith("avx512") for feature in metadata.target.features)
