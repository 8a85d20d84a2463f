"""Reading files and folders: formats, containers, shards, damaged and malicious files."""

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
from helpers.checkpoints import NAME, assert_holds, random_state, saved, with_prefix


class Config(dict):
    """A trainer's configuration: a class unknown to the loader."""


class TouchesFile:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


class SystemCall:
    def __reduce__(self):
        return os.system, ("exit 0",)


def test_averaged_weights_are_read_on_request(tmp_path):
    plain, averaged = random_state(seed=1), random_state(seed=2)
    path = saved(
        tmp_path / "t.pth", {"model": plain, "model_ema": with_prefix("module.", averaged)}
    )
    assert_holds(frontend.create_model(NAME, checkpoint=path), plain)
    assert_holds(frontend.create_model(NAME, checkpoint=path, use_ema=True), averaged)
    path = saved(tmp_path / "params.pth", {"params": plain, "params_ema": averaged})
    assert_holds(frontend.create_model(NAME, checkpoint=path, use_ema=True), averaged)
    with pytest.raises(CheckpointError, match="no averaged weights"):
        frontend.create_model(
            NAME, checkpoint=saved(tmp_path / "p.pth", {"model": plain}), use_ema=True
        )


@pytest.mark.parametrize("use_ema", [False, True])
def test_mmengine_stores_averaged_weights_as_the_usual_ones(tmp_path, use_ema):
    plain, averaged = random_state(seed=1), random_state(seed=2)
    raw = {"steps": torch.tensor(7), **with_prefix("module.backbone.", plain)}
    data = {"state_dict": with_prefix("backbone.", averaged), "ema_state_dict": raw}
    path = saved(tmp_path / "epoch_12.pth", data)
    assert_holds(frontend.create_model(NAME, checkpoint=path, use_ema=use_ema), averaged)


def test_folder_prefers_safetensors(tmp_path):
    first, second = random_state(seed=1), random_state(seed=2)
    saved(tmp_path / "pytorch_model.bin", with_prefix("model.", second))
    assert_holds(frontend.create_model(NAME, checkpoint=tmp_path), second)
    save_file(with_prefix("model.", first), tmp_path / "model.safetensors")
    assert_holds(frontend.create_model(NAME, checkpoint=tmp_path), first)


def test_sharded_folder(tmp_path):
    state = with_prefix("model.", random_state())
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
    assert_holds(frontend.create_model(NAME, checkpoint=tmp_path), random_state())

    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match="model-00002-of-00002"):
        frontend.create_model(NAME, checkpoint=tmp_path)
    index_file.write_text(json.dumps({"weight_map": {"a": "../elsewhere.safetensors"}}))
    with pytest.raises(CheckpointError, match="outside its folder"):
        frontend.create_model(NAME, checkpoint=tmp_path)
    for name in ("", ".", "..", "model.safetensors.index.json"):
        index_file.write_text(json.dumps({"weight_map": {"a": name}}))
        with pytest.raises(CheckpointError, match="outside its folder"):
            frontend.create_model(NAME, checkpoint=tmp_path)
    for text in ("[1, 2]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": [1]}}', "[" * 200000):
        index_file.write_text(text)
        with pytest.raises(CheckpointError, match="not an index"):
            frontend.create_model(NAME, checkpoint=tmp_path)


def training_checkpoint(path, state):
    settings = Config(MODEL=Config(NAME="x"), paths=[argparse.Namespace(a=1)])
    settings.note = "attribute"
    counts = collections.defaultdict(list, {1: [2]})
    return saved(
        path, {"model": state, "config": settings, "best": np.float64(83.5), "counts": counts}
    )


def test_objects_in_a_training_checkpoint_need_an_option(tmp_path):
    state = random_state()
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
def test_pickled_code_runs_only_with_allow_pickle(tmp_path, zipped):
    trace = tmp_path / "code_ran"
    path = tmp_path / "touch.pth"
    data = {"model": random_state(), "note": TouchesFile(trace)}
    torch.save(data, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match="ignore_objects=True"):
        frontend.create_model(NAME, checkpoint=path)
    frontend.create_model(NAME, checkpoint=path, ignore_objects=True)
    assert not trace.exists()
    frontend.create_model(NAME, checkpoint=path, allow_pickle=True)
    assert trace.exists()


@pytest.mark.parametrize("options", [{}, {"ignore_objects": True}])
def test_system_calls_are_named_and_never_run(tmp_path, options):
    path = saved(tmp_path / "evil.pth", {"model": random_state(), "note": SystemCall()})
    with pytest.raises(CheckpointError, match=r"asks to run \w+\.system"):
        frontend.create_model(NAME, checkpoint=path, **options)


def write(path, content):
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    ("content", "message"),
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
def test_other_files(content, message, options, tmp_path):
    with pytest.raises(CheckpointError, match=message):
        frontend.create_model(NAME, checkpoint=write(tmp_path / "file.pth", content), **options)


@pytest.mark.parametrize("kept", [0.001, 0.05, 0.5, 0.99, 0.9999])
@pytest.mark.parametrize("kind", ["pth", "safetensors"])
def test_truncated_files(kind, kept, tmp_path):
    path = tmp_path / f"weights.{kind}"
    state = random_state()
    if kind == "pth":
        torch.save({"model": state}, path)
    else:
        save_file(state, path)
    content = path.read_bytes()
    write(path, content[: int(len(content) * kept)])
    with pytest.raises(CheckpointError, match="truncated, damaged"):
        frontend.create_model(NAME, checkpoint=path)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([1, 2], "of type list"),
        (torch.ones(3), "of type Tensor"),
        ({}, "no named tensors; got nothing"),
        ({"model": {"epoch": 3}}, "no named tensors; got 'epoch'"),
        ({"conv1.weight": torch.ones(3)}, r"no InternImage: no key ends with patch_embed\.conv1"),
    ],
)
def test_files_without_an_internimage(data, message, tmp_path):
    with pytest.raises(CheckpointError, match=message):
        frontend.create_model(NAME, checkpoint=saved(tmp_path / "x.pth", data))


def test_missing_file_and_empty_folder(tmp_path):
    with pytest.raises(CheckpointError, match="there is no checkpoint"):
        frontend.create_model(NAME, checkpoint=tmp_path / "absent.pth")
    with pytest.raises(CheckpointError, match=r"model\.safetensors, "):
        frontend.create_model(NAME, checkpoint=tmp_path)
