import dataclasses
import json
import subprocess
import sys

import pytest

from dcnv3_tvm import frontend
from dcnv3_tvm.errors import InvalidArgumentError
from dcnv3_tvm.frontend.models.config import InternImageConfig
from dcnv3_tvm.frontend.models.variants import VARIANTS, model_config

RELEASED = [f"internimage_{size}" for size in ("t", "s", "b", "l", "xl", "h", "g")]
TINY = [name for name in VARIANTS if name.startswith("test_")]


def test_released_variants_are_listed_first_and_in_order():
    assert frontend.list_models("internimage_*") == RELEASED
    assert frontend.list_models() == [*RELEASED, "digits_internimage", *TINY]
    assert frontend.list_models("no_*") == []


@pytest.mark.parametrize("name", VARIANTS)
def test_config_round_trips_through_json(name):
    config = VARIANTS[name]
    assert config.variant == name
    assert InternImageConfig.from_json(json.loads(json.dumps(config.to_json()))) == config


@pytest.mark.parametrize("name", RELEASED)
def test_released_group_channels_and_resolution(name):
    config = VARIANTS[name]
    per_group = {c // g for c, g in zip(config.feature_channels, config.groups, strict=True)}
    assert per_group == ({32} if name[-1] in "hg" else {16})
    assert config.offset_scale == (2.0 if name[-1] == "l" else 1.0)
    assert config.preprocessing["crop"] == [config.resolution] * 2
    assert config.preprocessing["resize"] == config.resolution
    assert config.feature_strides == (4, 8, 16, 32)


def test_layer_scale_of_classification_and_detection():
    pairs = {
        name[12:]: (VARIANTS[name].layer_scale, VARIANTS[name].detection_layer_scale)
        for name in RELEASED
    }
    scaled = (1e-5, 1.0)
    assert pairs == {
        "t": (None, 1.0),
        "s": scaled,
        "b": scaled,
        "l": scaled,
        "xl": scaled,
        "h": (None, None),
        "g": (None, None),
    }


def test_tiny_variants_cover_every_option():
    configs = [VARIANTS[name] for name in TINY]
    paths = {(c.post_norm, c.res_post_norm, c.layer_scale is not None) for c in configs}
    assert paths == {
        (True, False, False),
        (False, True, False),
        (False, False, False),
        (True, False, True),
        (False, False, True),
    }
    assert {c.clip_projector for c in configs} == {False, True}
    assert {c.dw_kernel_size for c in configs} == {3, 5}
    assert {c.offset_scale for c in configs} == {1.0, 2.0}
    assert {c.remove_center for c in configs} == {False, True}
    assert {c.center_feature_scale for c in configs} == {False, True}
    assert any(c.level2_post_norm_block_ids for c in configs)


def test_feature_info_follows_out_indices():
    config = dataclasses.replace(VARIANTS["internimage_t"], features_only=True, out_indices=(1, 3))
    assert config.feature_info == (
        {"num_chs": 128, "reduction": 8, "module": "levels.1"},
        {"num_chs": 512, "reduction": 32, "module": "levels.3"},
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"depths": (1, 1, 1)}, "four stages"),
        ({"groups": (4, 8, 0, 32)}, "four stages"),
        ({"channels": 66}, "divided into its groups"),
        ({"channels": 5, "groups": (5, 5, 5, 5)}, "even number"),
        ({"dw_kernel_size": 4}, "dw_kernel_size"),
        ({"res_post_norm": True, "post_norm": True}, "res_post_norm"),
        ({"res_post_norm": True, "layer_scale": 1.0}, "res_post_norm"),
        ({"level2_post_norm_block_ids": (18,)}, "0 to 17"),
        ({"num_classes": -1}, "num_classes"),
        ({"out_indices": ()}, "out_indices"),
        ({"out_indices": (0, 4)}, "out_indices"),
        ({"out_indices": (2, 1)}, "out_indices"),
        ({"out_indices": (1, 1)}, "out_indices"),
    ],
)
def test_inconsistent_config_is_an_error(change, message):
    with pytest.raises(InvalidArgumentError, match=message):
        dataclasses.replace(VARIANTS["internimage_t"], **change)


def test_unknown_name_suggests_similar_names():
    with pytest.raises(InvalidArgumentError, match="internimage_xl, ") as caught:
        model_config("InternImage-T")
    assert caught.value.hint == "Did you mean internimage_t?"
    with pytest.raises(InvalidArgumentError, match="Did you mean internimage_"):
        model_config("internimage_u")
    with pytest.raises(InvalidArgumentError, match="list_models"):
        model_config("resnet50")


def test_listing_models_imports_neither_torch_nor_tvm():
    code = (
        "import sys; from dcnv3_tvm import frontend; frontend.list_models(); dir(frontend);"
        "print(sorted({'torch', 'tvm'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.strip() == "[]"


def test_unknown_attribute_of_the_frontend():
    with pytest.raises(AttributeError, match="no attribute 'creat_model'"):
        frontend.creat_model  # noqa: B018
