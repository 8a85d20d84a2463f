"""The model and the weights that arguments name, and errors that name the options."""

import dataclasses

import pytest
import torch
from safetensors.torch import save_file

from dcnv3_tvm.cli import compile as compile_verb
from dcnv3_tvm.cli import parser
from dcnv3_tvm.cli.model_arguments import (
    create,
    create_described,
    describe_weights,
    find_model,
)
from dcnv3_tvm.errors import CheckpointError
from dcnv3_tvm.frontend.models.internimage import InternImage
from dcnv3_tvm.frontend.models.variants import VARIANTS
from helpers.checkpoints import assert_holds, random_state, saved

NAME = "test_internimage_pre_norm"


def arguments(*words):
    whole = parser({"compile": compile_verb})
    return whole.parse_args(["compile", *map(str, words), "-o", "artifact"])


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("internimage_t_1k_224.pth", "internimage_t"),
        ("mask_rcnn_internimage_t_fpn_1x_coco.pth", "internimage_t"),
        ("cascade_InternImage_XL_fpn_3x_coco.pth", "internimage_xl"),
        ("dino_4scale_internimage_l_1x_coco_0.1x_backbone_lr.pth", "internimage_l"),
        (f"{NAME}_scale.pth", f"{NAME}_scale"),
    ],
)
def test_names_of_files(file, name, tmp_path):
    path = tmp_path / file
    path.touch()
    assert find_model(arguments(path)) == (name, path)


def test_folder_and_file_without_a_name_are_recognised_by_their_weights(tmp_path):
    with torch.device("meta"):
        state = InternImage(VARIANTS["internimage_s"]).state_dict()
    tiny = {key: torch.zeros(value.shape[:1]) for key, value in state.items()}
    folder = tmp_path / "download"
    folder.mkdir()
    save_file(tiny, folder / "model.safetensors")
    for path in (folder, saved(tmp_path / "best.pth", {"net": tiny})):
        assert find_model(arguments(path)) == ("internimage_s", path)
    with pytest.raises(CheckpointError, match="Name the model"):
        find_model(arguments(saved(tmp_path / "tiny.pth", random_state())))


def test_options_of_the_model_and_its_weights(tmp_path):
    config = dataclasses.replace(
        VARIANTS[NAME], features_only=True, out_indices=(1, 3), layer_scale=1.0
    )
    plain, averaged = InternImage(config).state_dict(), InternImage(config).state_dict()
    path = saved(tmp_path / f"{NAME}.pth", {"model": plain, "model_ema": averaged})
    found = arguments(path, "--features-only", "--out-indices", "1,3", "--use-ema")
    model = create(
        *find_model(found),
        found,
        features_only=found.features_only,
        out_indices=found.out_indices,
        layer_scale=found.layer_scale,
    )
    assert_holds(model, averaged)
    assert model.config.out_indices == (1, 3)
    assert describe_weights(path, found) == f"{NAME}.pth (averaged)"
    assert describe_weights(None, arguments(NAME, "--random-weights", "3")) == (
        "random weights (seed 3)"
    )
    assert arguments(NAME, "--layer-scale", "none").layer_scale is None


def test_a_checkpoint_alone_tells_its_head(tmp_path):
    state = random_state(NAME)
    fine_tuned = dict(state)
    for key in ("head.weight", "head.bias"):
        fine_tuned[key] = fine_tuned[key][:7]
    backbone = {key: value for key, value in state.items() if "head" not in key}
    pooled = {key: value for key, value in state.items() if not key.startswith("head.")}
    for content, options, shapes in (
        (fine_tuned, [], (1, 7)),
        (fine_tuned, ["--num-classes", "0"], (1, 96)),
        (pooled, [], (1, 96)),
        (backbone, [], [(1, 8, 8, 8), (1, 16, 4, 4), (1, 32, 2, 2), (1, 64, 1, 1)]),
        (fine_tuned, ["--features-only", "--out-indices", "1"], [(1, 16, 4, 4)]),
    ):
        path = saved(tmp_path / f"{NAME}.pth", {"model": content})
        found = arguments(path, *options)
        result = create_described(*find_model(found), found)(torch.zeros(1, 3, 32, 32))
        if isinstance(result, list):
            assert [tuple(each.shape) for each in result] == shapes
        else:
            assert tuple(result.shape) == shapes


def test_errors_name_options(cli, tmp_path):
    state = random_state(NAME)
    fine_tuned = dict(state)
    for key in ("head.weight", "head.bias"):
        fine_tuned[key] = fine_tuned[key][:7]
    backbone = {key: value for key, value in state.items() if "head" not in key}
    for content, option in (
        ({"model": fine_tuned}, "Use --num-classes 7"),
        ({"model": backbone}, "use --features-only"),
        ({"model": state, "config": torch.Generator}, "Use --ignore-objects"),
    ):
        path = saved(tmp_path / f"{NAME}.pth", content)
        found = cli("compile", NAME, "--checkpoint", path, "-o", tmp_path / "artifact")
        assert found.code == 2
        assert option in found.err
