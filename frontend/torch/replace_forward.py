"""Replace the forward of DCNv3 modules that sample with code of their own.

Such modules are recognised by their layers. Their results are compared with the published
computation before it replaces theirs.
"""

from __future__ import annotations

import copy
import types
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from dcnv3_tvm.errors import InvalidArgumentError
from dcnv3_tvm.frontend.torch.model_state import ModelState
from dcnv3_tvm.frontend.torch.replace_sampling import SamplingReached, SamplingReplacement
from dcnv3_tvm.frontend.torch.verify_sampling import TOLERANCE, relative_error
from dcnv3_tvm.imported_model import SamplingCheck
from dcnv3_tvm.pytorch.dcnv3_module import DCNv3
from dcnv3_tvm.spec import PARAMETERS, DCNv3Params

_SIZES: Final = ((128, 5), (5, 128))
"""Heights and widths of the compared images."""

_PROBED_SIZE: Final = (9, 9)


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


def compare_forward(
    part: nn.Module, path: str, sampling: SamplingReplacement
) -> SamplingCheck | None:
    """Compare the forward of a module with that of `DCNv3`, which may replace it.

    Parameters
    ----------
    part : nn.Module
        A module with the layers of DCNv3, at `path` of the model.
    sampling : SamplingReplacement
        The active replacement of sampling functions.

    Returns
    -------
    SamplingCheck or None
        None if the module calls the operator or a published sampling function itself.
    """
    source = module_source(part, path)
    if isinstance(part, DCNv3):
        return None
    try:
        if _reaches_sampling(part, sampling):
            return None
        error = 0.0
        for own, x, results in [_run_twice(part, size) for size in _SIZES]:
            use_published_forward(own)
            with torch.no_grad():
                expected = own(x).double().numpy()
            error = max(error, *(relative_error(got, expected) for got in results))
    except Exception as failure:  # raised by the user's forward, which may take another layout
        reason = f"it cannot be compared: {type(failure).__name__}: {failure}"
        return SamplingCheck(source, replaced=False, reason=reason)
    return SamplingCheck(source, replaced=error <= TOLERANCE, error=error)


def module_source(part: nn.Module, path: str) -> str:
    """Return the path and the class of a module, for a `SamplingCheck`."""
    return f"{path} ({type(part).__module__}.{type(part).__name__})".lstrip()


def use_published_forward(part: Any) -> None:
    """Replace the forward of a module with the layers of DCNv3."""
    part.params = _params_of(part)
    part.group_channels = part.input_proj.out_features // part.params.group
    part.center_feature_scale = bool(getattr(part, "center_feature_scale", False))
    part.recompute = False
    for method in (DCNv3.offsets_and_logits, DCNv3.sample, DCNv3.forward):
        setattr(part, method.__name__, types.MethodType(method, part))


def _reaches_sampling(part: nn.Module, sampling: SamplingReplacement) -> bool:
    """Whether a module calls the operator or a published sampling function."""
    own = _on_cpu(part)
    x = torch.ones((1, *_PROBED_SIZE, _channels(own)), dtype=torch.float32)
    sampling.stop_at_sampling = True
    try:
        with torch.no_grad(), _StopAtOperator():  # type: ignore[no-untyped-call]
            own(x)
    except SamplingReached:
        return True
    finally:
        sampling.stop_at_sampling = False
    return False


def _run_twice(part: nn.Module, size: tuple[int, int]) -> tuple[Any, Tensor, list[Any]]:
    """Call a copy of a module twice; return it with its input and both results."""
    own, x = _random_case(part, size)
    with torch.no_grad():
        results = [own(x)]
        state = ModelState(own)
        before = state.read()
        results.append(own(x))
    if state.read() != before:
        raise RuntimeError("it keeps state between calls")
    return own, x, results


class _StopAtOperator(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Raises `SamplingReached` where the operator is called."""

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[Any],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is torch.ops.dcnv3_tvm.dcnv3.default:
            raise SamplingReached
        return func(*args, **(kwargs or {}))


def _random_case(part: nn.Module, size: tuple[int, int]) -> tuple[Any, Tensor]:
    """Copy a module, with random offsets as large as an image and a random mask; make an image."""
    own = _on_cpu(part)
    generator = torch.Generator().manual_seed(0)
    random = partial(torch.randn, generator=generator, dtype=torch.float32)
    height, width = size
    # Offsets are pairs of x and y.
    for name, scales in (("offset", (width / 4, height / 4)), ("mask", (1.0,))):
        layer: Any = own.get_submodule(name)
        scale = torch.tensor(scales, dtype=torch.float32).repeat(layer.out_features // len(scales))
        weight = random(layer.out_features, layer.in_features) * layer.in_features**-0.5
        with torch.no_grad():
            layer.weight.copy_(weight * scale[:, None])
            if layer.bias is not None:
                layer.bias.copy_(random(layer.out_features) * scale)
    return own, random((1, height, width, _channels(own)))


def _on_cpu(part: nn.Module) -> Any:
    return copy.deepcopy(part).to(device="cpu", dtype=torch.float32)


def _channels(part: nn.Module) -> int:
    return part.get_parameter("input_proj.weight").shape[1]


def _params_of(part: Any) -> DCNv3Params:
    """Read the operator's parameters from the attributes of a published module."""
    # The softmax is a layer of the module, not part of the operator.
    names = (name for name in PARAMETERS if name != "softmax" and hasattr(part, name))
    return DCNv3Params(**{name: getattr(part, name) for name in names})
