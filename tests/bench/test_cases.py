"""Cases of the benchmarks match the encoders."""

import pytest
import torch

from dcnv3_tvm import frontend
from dcnv3_tvm.bench import cases
from dcnv3_tvm.errors import InvalidArgumentError


def test_suite():
    slugs = [spec.slug for spec in cases.suite()]
    assert len(slugs) == len(set(slugs)) == 28
    assert slugs[:4] == [
        "dcnv3-n1-h56-w56-c64-g4-k3-s1-p1-d1-f32",
        "dcnv3-n1-h28-w28-c128-g8-k3-s1-p1-d1-f32",
        "dcnv3-n1-h14-w14-c256-g16-k3-s1-p1-d1-f32",
        "dcnv3-n1-h7-w7-c512-g32-k3-s1-p1-d1-f32",
    ]
    assert "dcnv3-n1-h96-w96-c160-g10-k3-s1-p1-d1-o2-f32" in slugs
    assert "dcnv3-n1-h160-w160-c320-g10-k3-s1-p1-d1-f32" in slugs
    assert "dcnv3-n1-h200-w336-c64-g4-k3-s1-p1-d1-f32" in slugs
    assert [spec.batch for spec in cases.suite([("internimage_s", None)], batch=8)] == [8] * 4


@pytest.mark.parametrize("size", [(224, 224), (37, 61), (800, 1344)])
def test_stages_match_the_model(size):
    model = frontend.create_model("test_internimage_pre_norm", features_only=True, device="meta")
    maps = model(torch.empty(2, 3, *size, device="meta"))
    specs = cases.stage_specs("test_internimage_pre_norm", batch=2, size=size)
    for feature, spec in zip(maps, specs, strict=True):
        batch, channels, height, width = feature.shape
        assert spec.input_shape == (batch, height, width, channels)
        assert spec.output_size == (height, width)


def test_stages_keep_the_parameters_of_the_variant():
    assert all(spec.offset_scale == 2.0 for spec in cases.stage_specs("internimage_xl"))
    assert all(spec.remove_center for spec in cases.stage_specs("test_internimage_pre_norm_scale"))


def test_encoder_cases():
    assert cases.encoder_case("internimage_t").slug == "internimage_t-n1-h224-w224-f32"
    case = cases.encoder_case("internimage_t", batch=2, size=(800, 1344), features=True)
    assert case.slug == "internimage_t-n2-h800-w1344-features-f32"
    case = cases.encoder_case("internimage_t", dtype="bfloat16")
    assert case.slug == "internimage_t-n1-h224-w224-bf16"
    with pytest.raises(InvalidArgumentError, match="no model with this name"):
        cases.encoder_case("internimage_u")
