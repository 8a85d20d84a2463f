"""Whole encoders against PyTorch in float64 with the reference as operator."""

import numpy as np
import pytest

import dcnv3_tvm as dt
from dcnv3_tvm import frontend, machine
from dcnv3_tvm.errors import CompileError, TargetError
from dcnv3_tvm.frontend.variants import model_config
from dcnv3_tvm.testing.compare import compare
from dcnv3_tvm.testing.weights import randomize_

TINY = frontend.list_models("test_internimage_*")
CLIP = [name for name in TINY if model_config(name).clip_projector]
POOLED = [name for name in TINY if name not in CLIP]
# Importing and compiling open sizes takes longest: one variant of each head shows it.
OPEN = [POOLED[0], CLIP[0]]

DOT_PRODUCT = pytest.mark.skipif(
    "avx512bf16" in machine.missing_features(["avx512bf16"]),
    reason="this processor multiplies no bfloat16",
)


def _assert_agrees(compiled, model, *shapes, rng):
    for shape in shapes:
        image = rng.standard_normal(shape).astype("float32")
        differences = compare(compiled, model, image)
        assert len(differences) == 1 + 4
        assert [d for d in differences if not d.within(compiled.metadata.dtype)] == []
        # A model whose weights do nothing would agree with anything.
        assert all(d.scale > 1e-2 for d in differences)


@pytest.mark.parametrize("name", TINY)
def test_every_block_path_and_head(name, rng):
    model = randomize_(frontend.create_model(name), seed=1)
    compiled = dt.compile_model(frontend.import_model(model, example=(2, 3, 64, 96)))
    assert "unscheduled" not in compiled.metadata.kernels.values()
    _assert_agrees(compiled, model, (2, 3, 64, 96), rng=rng)


@pytest.mark.parametrize("name", OPEN)
def test_any_batch(name, rng):
    model = randomize_(frontend.create_model(name), seed=2)
    imported = frontend.import_model(model, example=(1, 3, 64, 32), dynamic_batch=True)
    compiled = dt.compile_model(imported)
    _assert_agrees(compiled, model, (1, 3, 64, 32), (5, 3, 64, 32), rng=rng)


def test_any_size(rng):
    model = randomize_(frontend.create_model(POOLED[-1]), seed=3)
    imported = frontend.import_model(
        model, example=(1, 3, 64, 96), dynamic_batch=True, dynamic_size=True
    )
    compiled = dt.compile_model(imported)
    _assert_agrees(compiled, model, (1, 3, 64, 96), (2, 3, 75, 131), (1, 3, 33, 40), rng=rng)


def test_a_clip_projector_of_any_size_is_refused_with_words():
    model = frontend.create_model(CLIP[0])
    imported = frontend.import_model(model, example=(1, 3, 64, 96), dynamic_size=True)
    with pytest.raises(CompileError, match="fixed image size"):
        dt.compile_model(imported)


@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", ["internimage_t", "internimage_s", "internimage_b"])
def test_released_variants(name, batch, rng):
    model = randomize_(frontend.create_model(name), seed=batch)
    shape = (batch, 3, 224, 224)
    compiled = dt.compile_model(frontend.import_model(model, example=shape))
    # Pooling, and the layout of the input and of the feature maps, are all that is not ours.
    others = [kernel for kernel, rule in compiled.metadata.kernels.items() if rule == "fallback"]
    assert len(others) <= 8
    _assert_agrees(compiled, model, shape, rng=rng)


@DOT_PRODUCT
@pytest.mark.parametrize("name", TINY)
def test_every_block_path_and_head_in_bfloat16(name, rng):
    model = randomize_(frontend.create_model(name), seed=1)
    imported = frontend.import_model(model, example=(2, 3, 64, 96))
    compiled = dt.compile_model(imported, dtype="bfloat16")
    rules = list(compiled.metadata.kernels.values())
    assert "unscheduled" not in rules
    # One a stage: those that stored float32 are gone.
    assert rules.count("dcnv3") == 4
    assert {tensor.dtype for tensor in compiled.metadata.entries["main"].outputs} == {"float32"}
    _assert_agrees(compiled, model, (2, 3, 64, 96), rng=rng)


@DOT_PRODUCT
@pytest.mark.slow
@pytest.mark.parametrize("name", ["internimage_t", "internimage_s", "internimage_b"])
def test_released_variants_in_bfloat16(name, rng):
    model = randomize_(frontend.create_model(name), seed=1)
    shape = (1, 3, 224, 224)
    compiled = dt.compile_model(frontend.import_model(model, example=shape), dtype="bfloat16")
    _assert_agrees(compiled, model, shape, rng=rng)


def test_bfloat16_for_a_processor_without_it_is_refused_with_words():
    imported = frontend.import_model(frontend.create_model(TINY[0]), example=(1, 3, 32, 32))
    with pytest.raises(TargetError, match=r"avx512_bf16.*float32"):
        dt.compile_model(imported, target="cpu-haswell", dtype="bfloat16")


def test_compiling_leaves_the_import_as_it_was(rng):
    model = randomize_(frontend.create_model(TINY[0]), seed=4)
    imported = frontend.import_model(model, example=(1, 3, 32, 32))
    image = rng.standard_normal((1, 3, 32, 32)).astype("float32")
    first, second = (dt.compile_model(imported)(image) for _ in range(2))
    np.testing.assert_array_equal(first, second)


def test_the_memory_of_a_call_is_known_where_the_sizes_are():
    model = frontend.create_model(POOLED[0])

    def memory(batch, **options):
        imported = frontend.import_model(model, example=(batch, 3, 32, 32), **options)
        return dt.compile_model(imported).metadata.activation_bytes

    one, three = memory(1), memory(3)
    # At least the largest result: what the first convolution of the stem makes.
    assert one["main"] >= 4 * 16 * 16 * model_config(POOLED[0]).channels // 2
    assert set(one) == set(three) == {"main", "features"}
    assert all(2 * one[entry] < three[entry] <= 3.5 * one[entry] for entry in one)
    assert memory(1, dynamic_batch=True) == {}


def test_the_dump_has_every_phase(tmp_path):
    from dcnv3_tvm.compiler.pipeline import PHASES

    phases = []
    imported = frontend.import_model(frontend.create_model(TINY[0]), example=(1, 3, 32, 32))
    dt.compile_model(imported, debug_dump=tmp_path / "dump", on_phase=phases.append)
    expected = [f"{number:02d}-{name}.py" for number, name in enumerate(PHASES)]
    assert sorted(path.name for path in (tmp_path / "dump").iterdir()) == expected
    assert phases[: len(PHASES)] == list(PHASES)
    assert "dcnv3_tvm.dcnv3" in (tmp_path / "dump" / expected[0]).read_text()


@pytest.mark.parametrize("dtype", ["float16", "int8", "float128"])
def test_an_unknown_dtype_is_refused(dtype):
    imported = frontend.import_model(frontend.create_model(TINY[0]), example=(1, 3, 32, 32))
    with pytest.raises(ValueError, match="allowed: float32"):
        dt.compile_model(imported, dtype=dtype)


def test_a_foreign_target_is_written_and_not_loaded(tmp_path):
    imported = frontend.import_model(frontend.create_model(TINY[0]), example=(1, 3, 32, 32))
    target = "llvm -mtriple=x86_64-linux-gnu -mcpu=haswell"
    metadata = dt.compile_artifact(imported, tmp_path / "haswell", target=target)
    assert metadata.target.mcpu == "haswell"
    assert "avx2" in metadata.target.features
    assert not any(feature.startswith("avx512") for feature in metadata.target.features)
