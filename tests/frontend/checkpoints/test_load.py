"""Every published layout is recognised, and weights that do not fit are reported."""

import pytest
import torch
from safetensors.torch import save_file

from dcnv3_tvm import frontend
from dcnv3_tvm.errors import CheckpointError
from dcnv3_tvm.frontend.models.internimage import InternImage
from dcnv3_tvm.frontend.models.variants import VARIANTS
from dcnv3_tvm.verify.random_weights import randomize_
from helpers.checkpoints import NAME, assert_holds, random_state, saved, with_prefix

WITHOUT_LAYER_SCALE = "test_internimage_pre_norm"


def backbone(state):
    return {k: v for k, v in state.items() if k.startswith(("patch_embed.", "levels."))}


def with_hugging_face_names(state):
    return {k.replace(".gamma", ".layer_scale"): v for k, v in state.items()}


LAYOUTS = {
    "bare": lambda state: state,
    "released": lambda state: {"model": state},
    "training": lambda state: {"model": state, "optimizer": {"lr": 0.1}, "epoch": 3},
    "data-parallel": lambda state: {"model": with_prefix("module.", state)},
    "deepspeed": lambda state: {"module": state, "dp_world_size": 8},
    "deepspeed-ddp": lambda state: {"module": with_prefix("module.", state)},
    "hugging-face-bin": lambda state: with_prefix("model.", with_hugging_face_names(state)),
    **{
        name: lambda state, name=name: {name: state, "loss": 0.1, "history": {"x": torch.ones(2)}}
        for name in ("model_state_dict", "net", "params", "weights", "encoder_of_my_own")
    },
    "only averaged": lambda state: {"model_ema": state},
    "nested prefixes": lambda state: {"state_dict": with_prefix("module.backbone.", state)},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_of_a_classifier(layout, tmp_path):
    state = random_state()
    path = saved(tmp_path / "weights.pth", LAYOUTS[layout](state))
    assert_holds(frontend.create_model(NAME, checkpoint=path), state)
    fresh = InternImage(VARIANTS[NAME])
    report = frontend.load_checkpoint(fresh, path)
    assert report.complete
    assert report.loaded == len(state)
    assert not report.skipped
    assert_holds(fresh, state)


@pytest.mark.parametrize("name", [name for name in VARIANTS if name.startswith("test_")])
def test_every_tiny_variant_loads_from_safetensors(name, tmp_path):
    state = random_state(name)
    save_file(state, tmp_path / "model.safetensors")
    assert_holds(frontend.create_model(name, checkpoint=tmp_path / "model.safetensors"), state)


@pytest.mark.parametrize("container", ["state_dict", "model", None])
def test_detector_checkpoint_lists_skipped_parts(container, tmp_path):
    state = random_state()
    detector = {
        **with_prefix("backbone.", backbone(state)),
        "neck.lateral_convs.0.conv.weight": torch.ones(1),
        "rpn_head.rpn_cls.bias": torch.ones(2),
        "roi_head.bbox_head.0.fc_cls.bias": torch.ones(3),
        "decode_head.conv_seg.weight": torch.ones(4),
    }
    data = {container: detector, "meta": {"epoch": 12}} if container else detector
    path = saved(tmp_path / "detector.pth", data)
    model = InternImage(frontend.create_model(NAME, features_only=True, device="meta").config)
    report = frontend.load_checkpoint(model, path)
    assert_holds(model, state)
    assert report.skipped == tuple(key for key in detector if not key.startswith("backbone."))
    text = str(report)
    for part in ("neck.* (1)", "rpn_head.* (1)", "roi_head.* (1)", "decode_head.* (1)"):
        assert part in text
    assert "prefix 'backbone.'" in text


def test_classifier_weights_load_into_a_pyramid(tmp_path):
    state = random_state()
    path = saved(tmp_path / "cls.pth", {"model": state})
    model = InternImage(frontend.create_model(NAME, features_only=True, device="meta").config)
    report = frontend.load_checkpoint(model, path)
    assert report.complete
    assert {key.split(".")[0] for key in report.skipped} == {"conv_head", "head"}
    assert_holds(model, state)


def test_layer_scale_follows_the_checkpoint(tmp_path):
    bare = saved(tmp_path / "bare.pth", {"model": random_state(WITHOUT_LAYER_SCALE)})
    model = frontend.create_model(WITHOUT_LAYER_SCALE, checkpoint=bare, features_only=True)
    assert model.config.layer_scale is None
    model_with_scale = InternImage(
        frontend.create_model(WITHOUT_LAYER_SCALE, features_only=True, device="meta").config
    )
    scaled = randomize_(model_with_scale).state_dict()
    assert any(key.endswith("gamma1") for key in scaled)
    path = saved(tmp_path / "scaled.pth", with_prefix("backbone.", scaled))
    model = frontend.create_model(WITHOUT_LAYER_SCALE, checkpoint=path, features_only=True)
    assert_holds(model, scaled)
    with pytest.raises(CheckpointError, match=r"layer_scale=1\.0"):
        frontend.create_model(
            WITHOUT_LAYER_SCALE, checkpoint=path, features_only=True, layer_scale=None
        )
    with pytest.raises(CheckpointError, match="layer_scale=None"):
        frontend.create_model(WITHOUT_LAYER_SCALE, checkpoint=bare, layer_scale=1.0)


def test_half_precision_weights_are_converted(tmp_path):
    state = {key: value.half() if value.ndim else value for key, value in random_state().items()}
    save_file(state, tmp_path / "half.safetensors")
    model = frontend.create_model(NAME, checkpoint=tmp_path / "half.safetensors")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    torch.testing.assert_close(model.head.weight, state["head.weight"].float(), rtol=0, atol=0)


def test_batch_norm_counter_is_optional(tmp_path):
    state = {k: v for k, v in random_state().items() if not k.endswith("num_batches_tracked")}
    save_file(state, tmp_path / "model.safetensors")
    model = frontend.create_model(NAME, checkpoint=tmp_path / "model.safetensors")
    assert model(torch.zeros(1, 3, 32, 32)).isfinite().all()


def test_loaded_model_does_not_depend_on_its_file(tmp_path):
    state = random_state()
    file = tmp_path / "model.safetensors"
    save_file(state, file)
    model = frontend.create_model(NAME, checkpoint=file)
    file.write_bytes(b"")
    assert_holds(model, state)


def test_mismatches_are_listed_and_leave_the_model_unchanged(tmp_path):
    state = random_state()
    del state["levels.2.blocks.1.dcn.mask.bias"]
    state["levels.0.blocks.0.extra.weight"] = torch.ones(3)
    state["levels.1.blocks.0.mlp.fc1.bias"] = torch.ones(5)
    path = saved(tmp_path / "bad.pth", {"model": state})
    model = InternImage(VARIANTS[NAME])
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(CheckpointError) as caught:
        frontend.load_checkpoint(model, path)
    text = str(caught.value)
    assert "1 missing (levels.2.blocks.1.dcn.mask.bias)" in text
    assert "1 unexpected (levels.0.blocks.0.extra.weight)" in text
    assert "levels.1.blocks.0.mlp.fc1.bias (5,), model (32,)" in text
    assert_holds(model, before)

    report = frontend.load_checkpoint(model, path, strict=False)
    assert not report.complete
    assert report.missing == ("levels.2.blocks.1.dcn.mask.bias",)
    assert report.unexpected == ("levels.0.blocks.0.extra.weight",)
    assert report.wrong_shape == ("levels.1.blocks.0.mlp.fc1.bias (5,), model (32,)",)
    assert "missing: levels.2.blocks.1.dcn.mask.bias" in str(report)
    assert torch.equal(model.head.weight, state["head.weight"])


def test_other_number_of_classes_hints_at_num_classes(tmp_path):
    state = random_state()
    state["head.weight"], state["head.bias"] = torch.ones(21841, 96), torch.ones(21841)
    path = saved(tmp_path / "22k.pth", {"model": state})
    with pytest.raises(CheckpointError, match="num_classes=21841") as caught:
        frontend.create_model(NAME, checkpoint=path)
    assert "num_classes=0" in str(caught.value)
    model = frontend.create_model(NAME, checkpoint=path, num_classes=21841)
    assert_holds(model, state)
    headless = frontend.create_model(NAME, checkpoint=path, num_classes=0)
    assert headless(torch.zeros(1, 3, 32, 32)).shape == (1, 96)


def test_backbone_weights_hint_at_features_only(tmp_path):
    path = saved(
        tmp_path / "b.pth", {"state_dict": with_prefix("backbone.", backbone(random_state()))}
    )
    with pytest.raises(CheckpointError, match="features_only=True"):
        frontend.create_model(NAME, checkpoint=path)


def test_weights_of_another_variant_are_recognised(tmp_path):
    with torch.device("meta"):
        state = InternImage(VARIANTS["internimage_s"]).state_dict()
    tiny = {k: torch.zeros(v.shape[:1]) for k, v in state.items()}
    path = saved(tmp_path / "s.pth", {"model": tiny})
    with pytest.raises(CheckpointError, match="look like internimage_s"):
        frontend.create_model("internimage_t", checkpoint=path, layer_scale=None)


@pytest.mark.parametrize("names", [("student", "teacher"), ("model", "state_dict")])
def test_several_containers_are_listed(tmp_path, names):
    path = saved(tmp_path / "two.pth", {name: random_state() for name in names})
    with pytest.raises(CheckpointError, match=f"under '{names[0]}', '{names[1]}'"):
        frontend.create_model(NAME, checkpoint=path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda value: value.to(torch.complex64), "complex64"),
        (lambda value: value.to(torch.int8), "int8"),
        (lambda value: value.to_sparse(), "sparse"),
        (lambda value: value.to("meta"), "without data"),
        (lambda value: value.fill_(torch.nan), "NaN or infinite"),
        (lambda value: torch.full_like(value, 1e300, dtype=torch.float64), "NaN or infinite"),
    ],
)
def test_values_that_are_no_weights(tmp_path, change, message):
    state = random_state()
    key = "levels.0.blocks.0.dcn.offset.bias"
    state[key] = change(state[key].clone())
    path = saved(tmp_path / "bad.pth", state)
    with pytest.raises(CheckpointError, match=message) as caught:
        frontend.create_model(NAME, checkpoint=path)
    assert key in str(caught.value)


def test_two_models_in_one_file_need_a_usual_prefix(tmp_path):
    first, second = random_state(seed=1), random_state(seed=2)
    both = {**with_prefix("student.", first), **with_prefix("teacher.", second)}
    with pytest.raises(CheckpointError, match=r"'student\.', 'teacher\.'"):
        frontend.create_model(NAME, checkpoint=saved(tmp_path / "two.pth", both))
    usual = {**with_prefix("teacher.", second), **with_prefix("backbone.", first)}
    model = frontend.create_model(NAME, checkpoint=saved(tmp_path / "usual.pth", usual))
    assert_holds(model, first)
