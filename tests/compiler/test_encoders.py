"""Whole encoders against PyTorch in float64 with the reference as operator."""

import functools

import numpy as np
import pytest

import dcnv3_tvm as dt
from dcnv3_tvm import frontend, machine
from dcnv3_tvm.frontend.models.variants import model_config
from dcnv3_tvm.verify.compare import compare, reference_outputs
from dcnv3_tvm.verify.random_weights import randomize_

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
