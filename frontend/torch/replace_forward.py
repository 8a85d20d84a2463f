"""Replace the forward of DCNv3 modules that sample with code of their own.

Such modules are recognised by their layers. Their results are compared with the published
computation before it replaces theirs.
"""

from __future__ import annotations

import copy
import types
from typing import Any, Final

import torch
from torch import nn

from dcnv3_tvm.errors import InvalidArgumentError, ModelImportError
from dcnv3_tvm.frontend.models.dcnv3_module import DCNv3
from dcnv3_tvm.frontend.torch.published_functions import CORE_NAME
from dcnv3_tvm.spec import PARAMETERS, DCNv3Params

_TOLERANCE: Final = 1e-4
"""Largest accepted max abs error relative to max|published result|."""


def has_dcnv3_layers(part: nn.Module) -> bool:
    """Whether a module has the layers of DCNv3, with the sizes that its group and kernel imply."""
    names = ("offset", "mask", "input_proj", "output_proj")
    layers = [layer for name in names if isinstance(layer := getattr(part, name, None), nn.Linear)]
    if len(layers) < len(names):
        return False
    try:
        params = _params_of(part)
    except (InvalidArgumentError, TypeError):
        return False
    offset, mask = layers[:2]
    return (offset.out_features, mask.out_features) == (
        params.offset_channels,
        params.mask_channels,
    )


def replace_forward(part: nn.Module, path: str) -> None:
    """Replace the forward of a module by that of `DCNv3`, if both compute the same.

    Raises
    ------
    ModelImportError
        If the results differ, or the module cannot run on the CPU.
    """
    where = f"{path} ({type(part).__module__}.{type(part).__name__})"
    hint = (
        f"Let its forward call a global function {CORE_NAME}(x, offset, mask, kernel_h, kernel_w, "
        "stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, group, group_channels, "
        "offset_scale, remove_center), or dcnv3_tvm.pytorch.operator.dcnv3."
    )
    try:
        error = _relative_error(part)
    except Exception as failure:  # raised by the user's forward
        raise ModelImportError(
            "a DCNv3 module samples with its own code, and running it on the CPU to compare it "
            "with the published operator failed",
            got=f"{where}: {type(failure).__name__}: {failure}",
            hint=hint,
        ) from failure
    if not error <= _TOLERANCE:
        raise ModelImportError(
            "a DCNv3 module does not compute the published operator",
            got=f"{where}, relative error {error:.1e}",
            allowed=f"at most {_TOLERANCE:.0e}",
            hint=hint,
        )
    _use_published_forward(part)


def _relative_error(part: nn.Module) -> float:
    """Compare on a small random input, with random offset and mask weights."""
    own = copy.deepcopy(part).to(device="cpu", dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    channels = own.get_parameter("input_proj.weight").shape[1]
    with torch.no_grad():
        for name in ("offset", "mask"):
            weight = own.get_parameter(f"{name}.weight")
            weight.copy_(torch.randn(weight.shape, generator=generator) / channels**0.5)
        published = copy.deepcopy(own)
        _use_published_forward(published)
        x = torch.randn((2, 7, 9, channels), generator=generator)
        got, expected = own(x), published(x)
    return float((got - expected).abs().max() / expected.abs().max())


def _use_published_forward(part: Any) -> None:
    part.params = _params_of(part)
    part.group_channels = part.input_proj.out_features // part.params.group
    part.center_feature_scale = bool(getattr(part, "center_feature_scale", False))
    part.sample = types.MethodType(DCNv3.sample, part)
    part.forward = types.MethodType(DCNv3.forward, part)


def _params_of(part: Any) -> DCNv3Params:
    """Read the operator's parameters from the attributes of a published module."""
    # The softmax is a layer of the module, not part of the operator.
    names = (name for name in PARAMETERS if name != "softmax" and hasattr(part, name))
    return DCNv3Params(**{name: getattr(part, name) for name in names})
