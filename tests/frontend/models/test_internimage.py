import collections
import copy
import dataclasses
import re

import pytest
import torch

from dcnv3_tvm.errors import InvalidArgumentError
from dcnv3_tvm.frontend.models.internimage import InternImage
from dcnv3_tvm.frontend.models.variants import VARIANTS
from dcnv3_tvm.pytorch.dcnv3_module import DCNv3
from dcnv3_tvm.verify.pytorch_reference import with_sampling
from dcnv3_tvm.verify.random_weights import randomize_

TINY = [name for name in VARIANTS if name.startswith("test_")]


def tiny(name, **changes):
    model = InternImage(dataclasses.replace(VARIANTS[name], **changes))
    return randomize_(model).eval().requires_grad_(False)


def image(*size, batch=1, seed=0):
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(seed))


def test_published_keys_with_layer_scale():
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


def test_published_keys_with_clip_projector():
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
def test_pyramid_rounds_sizes_up_and_has_values_of_order_one(name):
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
    # A weight without effect would mean that a path of the block is never taken. All blocks have
    # the same class, so weights with the same name are changed together, across all blocks.
    model = tiny(name)
    sample = image(32, 32)
    logits = model(sample)
    assert logits.shape == (1, 10)
    assert torch.isfinite(logits).all()
    by_name = collections.defaultdict(list)
    for key, parameter in model.named_parameters():
        by_name[re.sub(r"\.\d+\.", ".*.", key)].append(parameter)
    without_effect = []
    for name, parameters in by_name.items():
        kept = [parameter.clone() for parameter in parameters]
        for parameter in parameters:
            parameter.mul_(-1.5)
        if torch.equal(model(sample), logits):
            without_effect.append(name)
        for parameter, value in zip(parameters, kept, strict=True):
            parameter.copy_(value)
    # A softmax is invariant to a constant that is added to all keys.
    assert set(without_effect) <= {"clip_projector.cross_dcn.k_bias"}


def test_features_only_returns_selected_maps():
    name = "test_internimage_pre_norm"
    classifier = tiny(name)
    pyramid = tiny(name, features_only=True, out_indices=(0, 2))
    pyramid.load_state_dict(
        {k: v for k, v in classifier.state_dict().items() if k.startswith(("patch", "levels"))}
    )
    sample = image(33, 47)
    maps = pyramid(sample)
    expected = classifier.forward_pyramid(sample)
    assert len(maps) == 2
    torch.testing.assert_close(maps[0], expected[0], rtol=0, atol=0)
    torch.testing.assert_close(maps[1], expected[2], rtol=0, atol=0)


@pytest.mark.parametrize("name", ["test_internimage_pre_norm", "test_internimage_res_post_norm"])
def test_zero_classes_returns_pooled_features(name):
    model = tiny(name, num_classes=0)
    assert model(image(32, 32)).shape == (1, 24 if VARIANTS[name].clip_projector else 96)
    assert not any(key.startswith("head.") for key in model.state_dict())


def test_images_of_a_batch_are_independent():
    model = tiny("test_internimage_post_norm_scale")
    batch = image(40, 24, batch=2)
    together = model.forward_pyramid(batch)
    for row in range(2):
        alone = model.forward_pyramid(batch[row : row + 1])
        for a, b in zip(alone, together, strict=True):
            torch.testing.assert_close(a, b[row : row + 1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 32, 32, 3), (1, 1, 32, 32)])
def test_invalid_image_shape(shape):
    with pytest.raises(InvalidArgumentError, match=r"\(N, 3, H, W\)"):
        tiny("test_internimage_pre_norm")(torch.zeros(shape))


@pytest.mark.parametrize("size", [(48, 64), (64, 33)])
def test_clip_projector_needs_even_sizes_in_stage_2(size):
    model = tiny("test_internimage_post_norm")
    with pytest.raises(InvalidArgumentError, match="multiples of 32"):
        model(image(*size))


def test_pyramid_with_clip_projector_accepts_any_size():
    assert len(tiny("test_internimage_post_norm").forward_pyramid(image(48, 33))) == 4


def test_offset_and_mask_layers_are_initialised_to_zero():
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
    assert len(spread) == sum(model.config.depths)
    assert 0.5 < min(spread) <= max(spread) < 2.0


def test_random_weights_depend_only_on_the_seed():
    first = tiny("test_internimage_pre_norm").state_dict()
    again = tiny("test_internimage_pre_norm").state_dict()
    assert all(torch.equal(first[key], again[key]) for key in first)
    other = randomize_(InternImage(VARIANTS["test_internimage_pre_norm"]), seed=1).state_dict()
    assert not torch.equal(first["head.weight"], other["head.weight"])


@pytest.mark.parametrize("name", ["test_internimage_pre_norm", "test_internimage_post_norm_scale"])
def test_recomputed_activations_take_less_memory(name):
    model = with_sampling(randomize_(InternImage(VARIANTS[name])))
    recomputing = copy.deepcopy(model)
    recomputing.recompute_activations()
    kept, gradients = [], []
    for each in (model, recomputing):
        storages = {}

        def keep(tensor, storages=storages):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = each(image(32, 32, batch=2)).square().sum()
        gradients.append(torch.autograd.grad(loss, each.parameters()))
        kept.append(sum(storages.values()))
    assert kept[1] < 0.8 * kept[0]
    torch.testing.assert_close(gradients[0], gradients[1], rtol=0, atol=0)
