import collections
import dataclasses
import re

import pytest
import torch

from dcnv3_tvm.errors import InvalidArgumentError
from dcnv3_tvm.frontend.models.dcnv3_module import DCNv3
from dcnv3_tvm.frontend.models.internimage import InternImage
from dcnv3_tvm.frontend.models.variants import VARIANTS
from dcnv3_tvm.verify.random_weights import randomize_

PARAMETERS = {
    "internimage_t": 29_918_424,
    "internimage_s": 50_079_880,
    "internimage_b": 97_461_832,
    "internimage_l": 223_334_810,
    "internimage_xl": 334_819_780,
    "internimage_h": 1_089_636_760,
    "internimage_g": 3_076_373_352,
}
TINY = [name for name in VARIANTS if name.startswith("test_")]


def tiny(name, **changes):
    model = InternImage(dataclasses.replace(VARIANTS[name], **changes))
    return randomize_(model).eval().requires_grad_(False)


def image(*size, batch=1, seed=0):
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_count_is_the_published_one(name):
    with torch.device("meta"):
        model = InternImage(VARIANTS[name])
    assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS[name]


def test_published_keys_of_a_classifier_with_layer_scale():
    with torch.device("meta"):
        state = InternImage(VARIANTS["internimage_s"]).state_dict()
    shapes = {key: tuple(value.shape) for key, value in state.items()}
    block = "levels.1.blocks.3."
    assert {key.removeprefix(block) for key in shapes if key.startswith(block)} == {
        "gamma1",
        "gamma2",
        *(
            f"{layer}.{leaf}"
            for layer in (
                "norm1.0",
                "norm2.0",
                "dcn.dw_conv.0",
                "dcn.dw_conv.1.1",
                "dcn.offset",
                "dcn.mask",
                "dcn.input_proj",
                "dcn.output_proj",
                "mlp.fc1",
                "mlp.fc2",
            )
            for leaf in ("weight", "bias")
        ),
    }
    assert shapes[block + "dcn.offset.weight"] == (10 * 9 * 2, 160)
    assert shapes[block + "dcn.dw_conv.0.weight"] == (160, 1, 3, 3)
    assert shapes["patch_embed.conv1.weight"] == (40, 3, 3, 3)
    assert shapes["patch_embed.norm2.1.weight"] == (80,)
    assert shapes["levels.0.downsample.conv.weight"] == (160, 80, 3, 3)
    assert shapes["levels.2.downsample.norm.1.bias"] == (640,)
    assert shapes["conv_head.0.weight"] == (960, 640, 1, 1)
    assert shapes["conv_head.1.0.running_var"] == (960,)
    assert shapes["head.weight"] == (1000, 960)
    assert "levels.0.downsample.conv.bias" not in shapes
    assert "levels.0.norm.0.weight" not in shapes
    assert "levels.3.downsample.conv.weight" not in shapes


def test_published_keys_of_a_clip_projector():
    with torch.device("meta"):
        state = InternImage(VARIANTS["internimage_h"]).state_dict()
    shapes = {key: tuple(value.shape) for key, value in state.items()}
    assert shapes["levels.2.blocks.0.dcn.center_feature_scale_proj_weight"] == (40, 1280)
    assert shapes["levels.2.blocks.0.dcn.center_feature_scale_proj_bias"] == (40,)
    assert shapes["levels.2.blocks.31.res_post_norm2.0.weight"] == (1280,)
    assert shapes["levels.2.post_norms.4.0.weight"] == (1280,)
    assert shapes["levels.0.blocks.0.dcn.dw_conv.0.weight"] == (320, 1, 5, 5)
    assert shapes["levels.3.norm.0.weight"] == (2560,)
    assert shapes["dcnv3_head_x4.0.weight"] == (4096, 2560, 1, 1)
    assert shapes["dcnv3_head_x3.weight"] == (1024, 1280, 1, 1)
    assert shapes["clip_projector.norm1_k.0.weight"] == (1024,)
    assert shapes["clip_projector.cross_dcn.q.weight"] == (1024, 1024)
    assert shapes["clip_projector.cross_dcn.v_bias"] == (1024,)
    assert shapes["clip_projector.cross_dcn.proj.weight"] == (768, 1024)
    assert shapes["fc_norm.0.weight"] == (768,)
    assert shapes["head.weight"] == (1000, 768)
    assert not any(key.startswith("conv_head") for key in shapes)


@pytest.mark.parametrize("name", TINY)
def test_pyramid_has_rounded_up_sizes_and_finite_values_of_order_one(name):
    model = tiny(name)
    maps = model.forward_pyramid(image(37, 51, batch=2))
    assert [tuple(m.shape) for m in maps] == [
        (2, 8, 10, 13),
        (2, 16, 5, 7),
        (2, 32, 3, 4),
        (2, 64, 2, 2),
    ]
    for feature in maps:
        assert feature.is_contiguous()
        assert 0.3 < feature.std() < 5


@pytest.mark.parametrize("name", TINY)
def test_logits_depend_on_every_weight(name):
    # A weight that does nothing would be a block path left out. All blocks are of one class, so
    # the weights of one role are changed together.
    model = tiny(name)
    sample = image(32, 32)
    logits = model(sample)
    assert logits.shape == (1, 10)
    assert torch.isfinite(logits).all()
    roles = collections.defaultdict(list)
    for key, parameter in model.named_parameters():
        roles[re.sub(r"\.\d+\.", ".*.", key)].append(parameter)
    idle = []
    for role, parameters in roles.items():
        kept = [parameter.clone() for parameter in parameters]
        for parameter in parameters:
            parameter.mul_(-1.5)
        if torch.equal(model(sample), logits):
            idle.append(role)
        for parameter, value in zip(parameters, kept, strict=True):
            parameter.copy_(value)
    # A softmax does not see what is added to all keys alike.
    assert set(idle) <= {"clip_projector.cross_dcn.k_bias"}


def test_features_only_returns_the_chosen_maps_and_has_no_head():
    name = "test_internimage_pre_norm"
    whole = tiny(name)
    pyramid = tiny(name, features_only=True, out_indices=(0, 2))
    pyramid.load_state_dict(
        {k: v for k, v in whole.state_dict().items() if k.startswith(("patch", "levels"))}
    )
    sample = image(33, 47)
    maps = pyramid(sample)
    expected = whole.forward_pyramid(sample)
    assert len(maps) == 2
    torch.testing.assert_close(maps[0], expected[0], rtol=0, atol=0)
    torch.testing.assert_close(maps[1], expected[2], rtol=0, atol=0)


@pytest.mark.parametrize("name", ["test_internimage_pre_norm", "test_internimage_res_post_norm"])
def test_no_classes_gives_pooled_features(name):
    model = tiny(name, num_classes=0)
    assert model(image(32, 32)).shape == (1, 24 if VARIANTS[name].clip_projector else 96)
    assert not any(key.startswith("head.") for key in model.state_dict())


def test_a_pyramid_does_not_depend_on_the_batch():
    model = tiny("test_internimage_post_norm_scale")
    batch = image(40, 24, batch=3)
    together = model.forward_pyramid(batch)
    for row in range(3):
        alone = model.forward_pyramid(batch[row : row + 1])
        for a, b in zip(alone, together, strict=True):
            torch.testing.assert_close(a, b[row : row + 1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 32, 32, 3), (1, 1, 32, 32)])
def test_wrong_image_shape_is_refused_with_words(shape):
    with pytest.raises(InvalidArgumentError, match=r"\(N, 3, H, W\)"):
        tiny("test_internimage_pre_norm")(torch.zeros(shape))


@pytest.mark.parametrize("size", [(16, 32), (48, 64), (64, 33)])
def test_clip_projector_needs_an_even_third_stage(size):
    model = tiny("test_internimage_post_norm")
    with pytest.raises(InvalidArgumentError, match="multiples of 32"):
        model(image(*size))


def test_the_pyramid_of_a_clip_projector_takes_any_size():
    assert len(tiny("test_internimage_post_norm").forward_pyramid(image(48, 33))) == 4


def test_fresh_offset_and_mask_projections_are_zero():
    model = InternImage(VARIANTS["test_internimage_pre_norm"])
    for module in model.modules():
        if isinstance(module, DCNv3):
            assert not module.offset.weight.any()
            assert not module.mask.weight.any()
            assert module.input_proj.weight.any()


@pytest.mark.parametrize("name", TINY)
def test_randomized_offsets_are_about_one_pixel(name):
    model = tiny(name)
    spread = []
    for module in model.modules():
        if isinstance(module, DCNv3):
            module.offset.register_forward_hook(lambda _m, _i, out: spread.append(out.std().item()))
    model.forward_pyramid(image(64, 64))
    assert len(spread) == 5
    assert 0.5 < min(spread) <= max(spread) < 2.0


def test_randomize_repeats_itself_and_knows_seeds():
    first = tiny("test_internimage_pre_norm").state_dict()
    again = tiny("test_internimage_pre_norm").state_dict()
    assert all(torch.equal(first[key], again[key]) for key in first)
    other = randomize_(InternImage(VARIANTS["test_internimage_pre_norm"]), seed=1).state_dict()
    assert not torch.equal(first["head.weight"], other["head.weight"])


@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": 5},
        {"dilation": 2},
        {"dw_kernel_size": 7, "remove_center": True},
        {"center_feature_scale": True, "offset_scale": 0.5},
    ],
)
def test_dcnv3_module_keeps_the_size(options):
    module = randomize_(DCNv3(12, group=3, **options)).requires_grad_(False)
    y = module(torch.randn(2, 9, 7, 12))
    assert y.shape == (2, 9, 7, 12)
    assert torch.isfinite(y).all()


@pytest.mark.parametrize(
    "options", [{"group": 5}, {"group": 3, "kernel_size": 2}, {"group": 3, "dw_kernel_size": 4}]
)
def test_dcnv3_module_refuses_what_it_cannot_do(options):
    with pytest.raises(InvalidArgumentError, match="multiple of group"):
        DCNv3(12, **options)


def test_torch_export_of_a_classifier_holds_the_operator():
    model = tiny("test_internimage_pre_norm")
    exported = torch.export.export(model, (image(32, 40),))
    calls = [n for n in exported.graph.nodes if n.target is torch.ops.dcnv3_tvm.dcnv3.default]
    assert len(calls) == 5
