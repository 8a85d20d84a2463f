"""Whole encoders on the CPU, compared with PyTorch in float64 with the reference operator."""

import pytest

import dcnv3_tvm as dt
from dcnv3_tvm.compiler import compile as compiler
from dcnv3_tvm.compiler import pipeline
from dcnv3_tvm.targets import has_fast_bfloat16, resolve_target
from dcnv3_tvm.verify.compare import compare
from helpers.encoders import random_encoder

CPU_BFLOAT16_ERROR = 1e-2

FAST_BFLOAT16 = pytest.mark.skipif(
    not has_fast_bfloat16(resolve_target("auto")),
    reason="the CPU has no fast matmuls in bfloat16",
)


def assert_agrees(compiled, model, image, reference=None):
    differences = compare(compiled, model, image, reference)
    assert len(differences) == 1 + 4
    assert [d for d in differences if not d.within(compiled.metadata.dtype)] == []
    if compiled.metadata.dtype == "bfloat16":
        # Tighter than on GPUs, where activations are bfloat16 too.
        assert max(d.norm for d in differences) <= CPU_BFLOAT16_ERROR
    # Outputs of about zero would agree with anything.
    assert all(d.scale > 1e-2 for d in differences)


@FAST_BFLOAT16
# Both heads, and all norms but that of internimage_t below.
@pytest.mark.parametrize(
    "name", ["test_internimage_post_norm_scale", "test_internimage_res_post_norm"]
)
def test_bfloat16(name):
    model, imported, image, reference = random_encoder(name, (2, 3, 64, 96))
    compiled = dt.compile_model(imported, dtype="bfloat16")
    rules = list(compiled.metadata.kernels.values())
    assert "unscheduled" not in rules
    # One kernel a stage, which stores bfloat16.
    assert rules.count("dcnv3") == 4
    assert {tensor.dtype for tensor in compiled.metadata.entries["main"].outputs} == {"float32"}
    assert_agrees(compiled, model, image, reference)


def test_matrix_tiles_on_any_processor(monkeypatch):
    """Without AMX, the kernels call the portable functions."""
    monkeypatch.setattr(pipeline, "has_amx", lambda _target: True)
    monkeypatch.setattr(compiler, "effective_dtype", lambda dtype, _target: dtype)
    model, imported, image, reference = random_encoder("test_internimage_pre_norm", (1, 3, 32, 64))
    compiled = dt.compile_model(imported, dtype="bfloat16")
    assert list(compiled.metadata.kernels.values()).count("tile_matmul") >= 8
    assert_agrees(compiled, model, image, reference)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "shape", "depths", "dtype"),
    [
        ("internimage_t", (1, 3, 224, 224), None, "float32"),
        pytest.param(*("internimage_t", (1, 3, 224, 224), None, "bfloat16"), marks=FAST_BFLOAT16),
        ("internimage_b", (3, 3, 56, 88), (1, 1, 1, 1), "float32"),
    ],
)
def test_released_variants(name, shape, depths, dtype):
    model, imported, image, reference = random_encoder(name, shape, depths)
    compiled = dt.compile_model(imported, dtype=dtype)
    if dtype == "float32":
        # Pooling, and the layout of the input and of the feature maps.
        fallback = [name for name, rule in compiled.metadata.kernels.items() if rule == "fallback"]
        assert len(fallback) <= 8
    assert_agrees(compiled, model, image, reference)
