"""The DCNv3 module, compared with the reference and with a module in the published style."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from dcnv3_tvm.errors import InvalidArgumentError
from dcnv3_tvm.op.reference import dcnv3_reference
from dcnv3_tvm.pytorch import DCNv3
from dcnv3_tvm.spec import DCNv3Spec
from helpers.published_style_models import DCNv3Pytorch, randomised


@pytest.mark.parametrize(
    ("options", "softmax"),
    [
        ({}, True),
        ({"kernel_size": 5, "pad": 2}, False),
        ({"center_feature_scale": True, "offset_scale": 0.5}, False),
        ({"dilation": 2, "pad": 2, "remove_center": True}, True),
    ],
    ids=str,
)
def test_equals_a_published_module_with_its_weights(options, softmax):
    other = randomised(DCNv3Pytorch(12, group=3, **options)).double()
    module = DCNv3(12, group=3, dw_kernel_size=3, softmax=softmax, **options)
    module.double().eval().load_state_dict(other.state_dict())
    x = torch.randn(2, 9, 7, 12, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(module(x), other(x), rtol=0, atol=1e-12)


def test_starts_on_the_regular_grid():
    module = DCNv3(8, group=2)
    for layer in (module.offset, module.mask):
        assert not layer.weight.any()
    for layer in (module.offset, module.mask, module.input_proj, module.output_proj):
        assert not layer.bias.any()
    bound = (6 / 16) ** 0.5
    assert 0.5 * bound < module.input_proj.weight.abs().max() <= bound


def test_stride_halves_the_offsets_too():
    module = randomised(DCNv3(6, group=3, stride=2)).double()
    x = torch.randn(1, 9, 6, 6, dtype=torch.float64)
    with torch.no_grad():
        local = module.dw_conv(x.permute(0, 3, 1, 2))
        mask = F.softmax(module.mask(local).unflatten(-1, (3, 9)), -1).flatten(-2)
        spec = DCNv3Spec.of(x.shape, group=3, stride=2, dtype="float64")
        arrays = (each.numpy() for each in (module.input_proj(x), module.offset(local), mask))
        sampled = torch.from_numpy(dcnv3_reference(*arrays, spec))
        result = module(x)
        assert result.shape == (1, 5, 3, 6)
        np.testing.assert_allclose(result, module.output_proj(sampled), rtol=0, atol=1e-12)


@pytest.mark.parametrize("norm", [("LN", "1.1"), ("BN", "1.0")], ids=lambda norm: norm[0])
@pytest.mark.parametrize("act", ["GELU", "ReLU", "SiLU"])
def test_published_layer_names(norm, act):
    module = DCNv3(8, group=2, norm_layer=norm[0], act_layer=act)
    assert type(module.dw_conv[2]).__name__ == act
    assert f"dw_conv.{norm[1]}.weight" in module.state_dict()
    assert module(torch.randn(2, 4, 3, 8)).shape == (2, 4, 3, 8)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"group": 5}, "multiple of group"),
        ({"dw_kernel_size": 4}, "odd dw_kernel_size"),
        ({"kernel_size": 2, "dw_kernel_size": 3}, "Use an odd kernel_size"),
        ({"kernel_size": 5, "pad": 1}, r"Use pad=2\."),
        ({"kernel_size": (3, 3)}, "allowed: an integer"),
        ({"stride": 2, "center_feature_scale": True}, "stride=1"),
        ({"act_layer": "Tanh"}, "'GELU', 'ReLU', 'SiLU'"),
        ({"norm_layer": "GN"}, "'LN', 'BN'"),
    ],
    ids=str,
)
def test_invalid_arguments(options, message):
    with pytest.raises(InvalidArgumentError, match=message):
        DCNv3(12, **{"group": 3, **options})
