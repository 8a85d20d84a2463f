import pytest
import torch

from dcnv3_tvm import frontend
from dcnv3_tvm.errors import InvalidArgumentError


def test_created_model_is_ready_for_inference():
    model = frontend.create_model("test_internimage_pre_norm")
    assert isinstance(model, frontend.InternImage)
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert model.config.variant == "test_internimage_pre_norm"
    assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 10)


@pytest.mark.parametrize("name", ["internimage_t", "internimage_h"])
def test_number_of_classes(name):
    model = frontend.create_model(name, num_classes=7, device="meta")
    assert model.state_dict()["head.weight"].is_meta
    assert model.head.out_features == 7


def test_features_only_and_out_indices():
    model = frontend.create_model(
        "internimage_b", features_only=True, out_indices=[1, 2, 3], device="meta"
    )
    assert [info["num_chs"] for info in model.config.feature_info] == [224, 448, 896]
    assert [info["reduction"] for info in model.config.feature_info] == [8, 16, 32]
    assert not any("head" in key for key in model.state_dict())


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("internimage_t", {}, None),
        ("internimage_s", {}, 1e-5),
        ("internimage_t", {"features_only": True}, 1.0),
        ("internimage_s", {"features_only": True}, 1.0),
        ("internimage_h", {"features_only": True}, None),
        ("internimage_t", {"layer_scale": 0.1}, 0.1),
        ("internimage_s", {"layer_scale": None}, None),
    ],
)
def test_layer_scale(name, options, expected):
    model = frontend.create_model(name, device="meta", **options)
    assert model.config.layer_scale == expected
    assert ("levels.0.blocks.0.gamma1" in model.state_dict()) == (expected is not None)


def test_invalid_arguments():
    with pytest.raises(InvalidArgumentError, match="Did you mean"):
        frontend.create_model("internimage_tt")
    with pytest.raises(InvalidArgumentError, match="layer_scale"):
        frontend.create_model("internimage_t", layer_scale="off")
    with pytest.raises(InvalidArgumentError, match="out_indices"):
        frontend.create_model("internimage_t", features_only=True, out_indices=(5,))
