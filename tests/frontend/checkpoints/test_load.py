import argparse
import collections
import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from dcnv3_tvm import frontend
from dcnv3_tvm.errors import CheckpointError
from dcnv3_tvm.frontend.models.internimage import InternImage
from dcnv3_tvm.frontend.models.variants import VARIANTS
from dcnv3_tvm.verify.random_weights import randomize_

NAME = "test_internimage_post_norm_scale"
SCALELESS = "test_internimage_pre_norm"


def weights(name=NAME, seed=1):
    return randomize_(InternImage(VARIANTS[name]), seed=seed).state_dict()


def prefixed(prefix, state):
    return {prefix + key: value for key, value in state.items()}


def backbone(state):
    return {k: v for k, v in state.items() if k.startswith(("patch_embed.", "levels."))}


def renamed(state):
    return {k.replace(".gamma", ".layer_scale"): v for k, v in state.items()}


def saved(path, data):
    torch.save(data, path)
    return path


def assert_holds(model, state):
    own = model.state_dict()
    assert own
    for key, value in own.items():
        torch.testing.assert_close(value, state[key], rtol=0, atol=0, msg=key)


class Config(dict):
    """A trainer's configuration: a class the loader does not know."""


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


class SystemCall:
    def __reduce__(self):
        return os.system, ("exit 0",)


LAYOUTS = {
    "bare": lambda state: state,
    "released": lambda state: {"model": state},
    "training": lambda state: {"model": state, "optimizer": {"lr": 0.1}, "epoch": 3},
    "data-parallel": lambda state: {"model": prefixed("module.", state)},
    "deepspeed": lambda state: {"module": state, "dp_world_size": 8},
    "deepspeed-ddp": lambda state: {"module": prefixed("module.", state)},
    "hugging-face-bin": lambda state: prefixed("model.", renamed(state)),
    "only-averaged": lambda state: {"model_ema": state},
    "wrapped-twice": lambda state: {"state_dict": prefixed("module.backbone.", state)},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_of_a_classifier(layout, tmp_path):
    state = weights()
    path = saved(tmp_path / "weights.pth", LAYOUTS[layout](state))
    assert_holds(frontend.create_model(NAME, checkpoint=path), state)
    fresh = InternImage(VARIANTS[NAME])
    report = frontend.load_checkpoint(fresh, path)
    assert report.complete
    assert report.loaded == len(state)
    assert not report.skipped
    assert_holds(fresh, state)


@pytest.mark.parametrize("name", [name for name in VARIANTS if name.startswith("test_")])
def test_every_tiny_variant_from_safetensors(name, tmp_path):
    state = weights(name)
    save_file(state, tmp_path / "model.safetensors")
    assert_holds(frontend.create_model(name, checkpoint=tmp_path / "model.safetensors"), state)


@pytest.mark.parametrize("container", ["state_dict", "model", None])
def test_detector_checkpoint_skips_the_other_heads_by_name(container, tmp_path):
    state = weights()
    detector = {
        **prefixed("backbone.", backbone(state)),
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
    words = str(report)
    for part in ("neck.* (1)", "rpn_head.* (1)", "roi_head.* (1)", "decode_head.* (1)"):
        assert part in words
    assert "prefix 'backbone.'" in words


def test_classifier_weights_make_a_pyramid(tmp_path):
    state = weights()
    path = saved(tmp_path / "cls.pth", {"model": state})
    model = InternImage(frontend.create_model(NAME, features_only=True, device="meta").config)
    report = frontend.load_checkpoint(model, path)
    assert report.complete
    assert {key.split(".")[0] for key in report.skipped} == {"conv_head", "head"}
    assert_holds(model, state)


def test_layer_scale_follows_the_checkpoint(tmp_path):
    bare = saved(tmp_path / "bare.pth", {"model": weights(SCALELESS)})
    model = frontend.create_model(SCALELESS, checkpoint=bare, features_only=True)
    assert model.config.layer_scale is None
    scaled_model = InternImage(
        frontend.create_model(SCALELESS, features_only=True, device="meta").config
    )
    scaled = randomize_(scaled_model).state_dict()
    assert any(key.endswith("gamma1") for key in scaled)
    path = saved(tmp_path / "scaled.pth", prefixed("backbone.", scaled))
    model = frontend.create_model(SCALELESS, checkpoint=path, features_only=True)
    assert_holds(model, scaled)
    with pytest.raises(CheckpointError, match=r"layer_scale=1\.0"):
        frontend.create_model(SCALELESS, checkpoint=path, features_only=True, layer_scale=None)
    with pytest.raises(CheckpointError, match="layer_scale=None"):
        frontend.create_model(SCALELESS, checkpoint=bare, layer_scale=1.0)


def test_averaged_weights_on_request_only(tmp_path):
    plain, averaged = weights(seed=1), weights(seed=2)
    path = saved(tmp_path / "t.pth", {"model": plain, "model_ema": prefixed("module.", averaged)})
    assert_holds(frontend.create_model(NAME, checkpoint=path), plain)
    assert_holds(frontend.create_model(NAME, checkpoint=path, use_ema=True), averaged)
    with pytest.raises(CheckpointError, match="no averaged weights"):
        frontend.create_model(
            NAME, checkpoint=saved(tmp_path / "p.pth", {"model": plain}), use_ema=True
        )


def test_half_precision_weights_are_converted(tmp_path):
    state = {key: value.half() if value.ndim else value for key, value in weights().items()}
    save_file(state, tmp_path / "half.safetensors")
    model = frontend.create_model(NAME, checkpoint=tmp_path / "half.safetensors")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    torch.testing.assert_close(model.head.weight, state["head.weight"].float(), rtol=0, atol=0)


def test_the_batch_counter_is_optional(tmp_path):
    state = {k: v for k, v in weights().items() if not k.endswith("num_batches_tracked")}
    save_file(state, tmp_path / "model.safetensors")
    model = frontend.create_model(NAME, checkpoint=tmp_path / "model.safetensors")
    assert model(torch.zeros(1, 3, 32, 32)).isfinite().all()


def test_a_loaded_model_outlives_its_file(tmp_path):
    state = weights()
    file = tmp_path / "model.safetensors"
    save_file(state, file)
    model = frontend.create_model(NAME, checkpoint=file)
    file.write_bytes(b"")
    assert_holds(model, state)


def test_folder_prefers_safetensors(tmp_path):
    first, second = weights(seed=1), weights(seed=2)
    saved(tmp_path / "pytorch_model.bin", prefixed("model.", second))
    assert_holds(frontend.create_model(NAME, checkpoint=tmp_path), second)
    save_file(prefixed("model.", renamed(first)), tmp_path / "model.safetensors")
    assert_holds(frontend.create_model(NAME, checkpoint=tmp_path), first)


def test_sharded_folder(tmp_path):
    state = prefixed("model.", weights())
    shards = {"model-00001-of-00002.safetensors": {}, "model-00002-of-00002.safetensors": {}}
    index = {}
    for number, (key, value) in enumerate(state.items()):
        shard = list(shards)[number % 2]
        shards[shard][key] = value
        index[key] = shard
    for shard, part in shards.items():
        save_file(part, tmp_path / shard)
    index_file = tmp_path / "model.safetensors.index.json"
    index_file.write_text(json.dumps({"weight_map": index}))
    assert_holds(frontend.create_model(NAME, checkpoint=tmp_path), weights())

    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match="model-00002-of-00002"):
        frontend.create_model(NAME, checkpoint=tmp_path)
    index_file.write_text(json.dumps({"weight_map": {"a": "../elsewhere.safetensors"}}))
    with pytest.raises(CheckpointError, match="outside its folder"):
        frontend.create_model(NAME, checkpoint=tmp_path)
    index_file.write_text("[1, 2]")
    with pytest.raises(CheckpointError, match="not an index"):
        frontend.create_model(NAME, checkpoint=tmp_path)


def test_misfits_are_named_and_change_nothing(tmp_path):
    state = weights()
    del state["levels.2.blocks.1.dcn.mask.bias"]
    state["levels.0.blocks.0.extra.weight"] = torch.ones(3)
    state["levels.1.blocks.0.mlp.fc1.bias"] = torch.ones(5)
    path = saved(tmp_path / "bad.pth", {"model": state})
    model = InternImage(VARIANTS[NAME])
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(CheckpointError) as caught:
        frontend.load_checkpoint(model, path)
    words = str(caught.value)
    assert "1 missing (levels.2.blocks.1.dcn.mask.bias)" in words
    assert "1 unexpected (levels.0.blocks.0.extra.weight)" in words
    assert "levels.1.blocks.0.mlp.fc1.bias (5,), model (32,)" in words
    assert_holds(model, before)

    report = frontend.load_checkpoint(model, path, strict=False)
    assert not report.complete
    assert report.missing == ("levels.2.blocks.1.dcn.mask.bias",)
    assert report.unexpected == ("levels.0.blocks.0.extra.weight",)
    assert report.wrong_shape == ("levels.1.blocks.0.mlp.fc1.bias (5,), model (32,)",)
    assert "missing: levels.2.blocks.1.dcn.mask.bias" in str(report)
    assert torch.equal(model.head.weight, state["head.weight"])


def test_other_class_count_says_what_to_type(tmp_path):
    state = weights()
    state["head.weight"], state["head.bias"] = torch.ones(21841, 96), torch.ones(21841)
    path = saved(tmp_path / "22k.pth", {"model": state})
    with pytest.raises(CheckpointError, match="num_classes=21841") as caught:
        frontend.create_model(NAME, checkpoint=path)
    assert "num_classes=0" in str(caught.value)
    model = frontend.create_model(NAME, checkpoint=path, num_classes=21841)
    assert_holds(model, state)
    headless = frontend.create_model(NAME, checkpoint=path, num_classes=0)
    assert headless(torch.zeros(1, 3, 32, 32)).shape == (1, 96)


def test_backbone_weights_for_a_classifier_say_what_to_type(tmp_path):
    path = saved(tmp_path / "b.pth", {"state_dict": prefixed("backbone.", backbone(weights()))})
    with pytest.raises(CheckpointError, match="features_only=True"):
        frontend.create_model(NAME, checkpoint=path)


def test_another_variants_weights_are_recognised(tmp_path):
    with torch.device("meta"):
        state = InternImage(VARIANTS["internimage_s"]).state_dict()
    tiny = {k: torch.empty(v.shape[:1]) for k, v in state.items()}
    path = saved(tmp_path / "s.pth", {"model": tiny})
    with pytest.raises(CheckpointError, match="look like internimage_s"):
        frontend.create_model("internimage_t", checkpoint=path, layer_scale=None)


def test_two_models_in_one_file_are_refused_unless_one_is_usual(tmp_path):
    first, second = weights(seed=1), weights(seed=2)
    both = {**prefixed("student.", first), **prefixed("teacher.", second)}
    with pytest.raises(CheckpointError, match=r"'student\.', 'teacher\.'"):
        frontend.create_model(NAME, checkpoint=saved(tmp_path / "two.pth", both))
    usual = {**prefixed("teacher.", second), **prefixed("backbone.", first)}
    model = frontend.create_model(NAME, checkpoint=saved(tmp_path / "usual.pth", usual))
    assert_holds(model, first)


def training_checkpoint(path, state):
    settings = Config(MODEL=Config(NAME="x"), paths=[argparse.Namespace(a=1)])
    settings.note = "attribute"
    counts = collections.defaultdict(list, {1: [2]})
    return saved(
        path, {"model": state, "config": settings, "best": np.float64(83.5), "counts": counts}
    )


def test_objects_in_a_training_checkpoint_are_refused_or_left_out(tmp_path):
    state = weights()
    path = training_checkpoint(tmp_path / "train.pth", state)
    with pytest.raises(CheckpointError, match=r"argparse\.Namespace") as caught:
        frontend.create_model(NAME, checkpoint=path)
    assert "ignore_objects=True" in str(caught.value)
    assert "allow_pickle=True" in str(caught.value)
    model = InternImage(VARIANTS[NAME])
    report = frontend.load_checkpoint(model, path, ignore_objects=True)
    assert_holds(model, state)
    assert "argparse.Namespace" in report.ignored
    assert "config" in report.ignored
    assert_holds(frontend.create_model(NAME, checkpoint=path, allow_pickle=True), state)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_runs_only_when_asked_to(tmp_path, zipped):
    trace = tmp_path / "it_ran"
    path = tmp_path / "bomb.pth"
    data = {"model": weights(), "note": Bomb(trace)}
    torch.save(data, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match="ignore_objects=True"):
        frontend.create_model(NAME, checkpoint=path)
    frontend.create_model(NAME, checkpoint=path, ignore_objects=True)
    assert not trace.exists()
    frontend.create_model(NAME, checkpoint=path, allow_pickle=True)
    assert trace.exists()


@pytest.mark.parametrize("options", [{}, {"ignore_objects": True}])
def test_a_call_of_the_system_is_refused_by_name(tmp_path, options):
    path = saved(tmp_path / "evil.pth", {"model": weights(), "note": SystemCall()})
    with pytest.raises(CheckpointError, match=r"asks to run \w+\.system"):
        frontend.create_model(NAME, checkpoint=path, **options)


def write(path, content):
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is empty"),
        (b"\x89PNG\r\n\x1a\n" + bytes(40), "a PNG image"),
        (b"\xff\xd8\xff\xe0" + bytes(40), "a JPEG image"),
        (b"<!DOCTYPE html><html>", "a web page"),
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
        (b"just some text", "begins with b'just som'"),
        (b"x", "begins with"),
        (pickle.dumps({"a": np.zeros(2)}), "a plain Python pickle"),
        (pickle.dumps(SystemCall()), "a plain Python pickle"),
        (b"PK\x03\x04" + bytes(100), "truncated, damaged"),
    ],
)
@pytest.mark.parametrize("options", [{}, {"ignore_objects": True}, {"allow_pickle": True}])
def test_files_that_are_no_checkpoint(content, words, options, tmp_path):
    with pytest.raises(CheckpointError, match=words):
        frontend.create_model(NAME, checkpoint=write(tmp_path / "file.pth", content), **options)


@pytest.mark.parametrize("kept", [0.001, 0.05, 0.5, 0.99, 0.9999])
@pytest.mark.parametrize("kind", ["pth", "safetensors"])
def test_truncated_files(kind, kept, tmp_path):
    path = tmp_path / f"weights.{kind}"
    state = weights()
    if kind == "pth":
        torch.save({"model": state}, path)
    else:
        save_file(state, path)
    content = path.read_bytes()
    write(path, content[: int(len(content) * kept)])
    with pytest.raises(CheckpointError, match="truncated, damaged"):
        frontend.create_model(NAME, checkpoint=path)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ([1, 2], "of type list"),
        (torch.ones(3), "of type Tensor"),
        ({}, "no named tensors; got nothing"),
        ({"model": {"epoch": 3}}, "no named tensors; got 'epoch'"),
        ({"conv1.weight": torch.ones(3)}, r"no InternImage: no key ends with patch_embed\.conv1"),
    ],
)
def test_files_without_an_internimage(data, words, tmp_path):
    with pytest.raises(CheckpointError, match=words):
        frontend.create_model(NAME, checkpoint=saved(tmp_path / "x.pth", data))


def test_no_file_and_no_folder(tmp_path):
    with pytest.raises(CheckpointError, match="there is no checkpoint"):
        frontend.create_model(NAME, checkpoint=tmp_path / "absent.pth")
    with pytest.raises(CheckpointError, match=r"model\.safetensors, "):
        frontend.create_model(NAME, checkpoint=tmp_path)
