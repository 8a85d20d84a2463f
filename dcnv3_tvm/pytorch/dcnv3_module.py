"""The DCNv3 module: the deformable operator with the layers that compute its inputs."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Final, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dcnv3_tvm.checks import integer
from dcnv3_tvm.errors import InvalidArgumentError
from dcnv3_tvm.pytorch import operator as torch_op
from dcnv3_tvm.pytorch.layers import (
    batch_norm_to_channels_last,
    layer_norm_to_channels_last,
    recomputed,
)
from dcnv3_tvm.spec import DCNv3Params

LayerT = TypeVar("LayerT")

_ACTIVATIONS: Final[dict[str, Callable[[], nn.Module]]] = {
    "GELU": nn.GELU,
    "ReLU": nn.ReLU,
    "SiLU": nn.SiLU,
}
_NORMS: Final[dict[str, Callable[[int], nn.Module]]] = {
    "LN": layer_norm_to_channels_last,
    "BN": batch_norm_to_channels_last,
}


class DCNv3(nn.Module):
    """Deformable convolution v3, (N, H, W, C) to (N, Ho, Wo, C).

    A depthwise convolution extracts local features, from which one linear layer computes the
    sampling offsets and another the modulation mask. Both start at zero, as published: without
    loaded weights the module samples the regular grid.

    Arguments, state-dict keys and initialisation are those of the published module, whose weights
    it loads.

    Parameters
    ----------
    channels : int
        C, a multiple of `group`.
    kernel_size : int
        Of the deformable convolution.
    dw_kernel_size : int or None
        Kernel of the depthwise convolution, odd; None for `kernel_size`.
    stride : int
        Of the deformable and of the depthwise convolution. (The published module computes offsets
        and mask at the size of its input, which gives no defined result for another stride than 1.)
    pad : int or None
        The only padding that keeps H and W at stride 1, ``dilation * (kernel_size - 1) / 2``, which
        offsets and mask need; None for that.
    dilation : int
        Of the deformable convolution.
    group : int
        Channel groups; each has its own offsets and mask.
    offset_scale : float
        Factor on the regular grid and on the offsets.
    act_layer : str
        Activation after the depthwise convolution: "GELU", "ReLU" or "SiLU".
    norm_layer : str
        Normalisation before the activation: "LN" or "BN".
    center_feature_scale : bool
        Blend the sampled result with the projected input by a learned gate per group; needs
        stride 1.
    remove_center : bool
        Leave out the central kernel point.
    softmax : bool
        Let the operator apply the softmax over the points, instead of a layer before it, as always
        in training. The result is the same.

    Raises
    ------
    InvalidArgumentError
        If an argument is not valid, or arguments do not fit together.

    Examples
    --------
    >>> import torch
    >>> DCNv3(16, group=2, stride=2)(torch.rand(1, 9, 6, 16)).shape
    torch.Size([1, 5, 3, 16])
    """

    recompute = False
    """Whether backward computes norm, activation and offsets again; only with ``norm_layer="LN"``,
    because BatchNorm counts what it sees."""

    def __init__(
        self,
        channels: int = 64,
        *,
        kernel_size: int = 3,
        dw_kernel_size: int | None = None,
        stride: int = 1,
        pad: int | None = None,
        dilation: int = 1,
        group: int = 4,
        offset_scale: float = 1.0,
        act_layer: str = "GELU",
        norm_layer: str = "LN",
        center_feature_scale: bool = False,
        remove_center: bool = False,
        softmax: bool = False,
    ) -> None:
        super().__init__()
        kernel_size = integer("kernel_size", kernel_size, low=1)
        dilation = integer("dilation", dilation, low=1)
        stride = integer("stride", stride, low=1)
        dw_kernel_size = kernel_size if dw_kernel_size is None else dw_kernel_size
        if pad is None:
            pad = dilation * (kernel_size - 1) // 2
        pad = integer("pad", pad, low=0)
        self.params = DCNv3Params(
            group=group,
            kernel_size=kernel_size,
            stride=stride,
            pad=pad,
            dilation=dilation,
            offset_scale=offset_scale,
            remove_center=remove_center,
            softmax=softmax,
        )
        if channels % group or dw_kernel_size % 2 == 0:
            raise InvalidArgumentError(
                "the DCNv3 module has invalid sizes",
                got=f"channels={channels}, group={group}, dw_kernel_size={dw_kernel_size}",
                allowed="channels a multiple of group, and an odd dw_kernel_size",
            )
        _check_padding(kernel_size, pad, dilation)
        if center_feature_scale and stride != 1:
            raise InvalidArgumentError(
                "center_feature_scale blends result and input, which need one size",
                got=f"stride={stride}",
                allowed="stride=1",
            )
        self.channels = channels
        self.kernel_size = kernel_size
        self.dw_kernel_size = dw_kernel_size
        self.stride = stride
        self.pad = pad
        self.dilation = dilation
        self.group = group
        self.group_channels = channels // group
        self.offset_scale = offset_scale
        self.center_feature_scale = center_feature_scale
        self.remove_center = int(remove_center)
        self.dw_conv = nn.Sequential(
            nn.Conv2d(
                channels,
                channels,
                dw_kernel_size,
                stride=stride,
                padding=(dw_kernel_size - 1) // 2,
                groups=channels,
            ),
            _named("norm_layer", norm_layer, _NORMS)(channels),
            _named("act_layer", act_layer, _ACTIVATIONS)(),
        )
        self.offset = nn.Linear(channels, self.params.offset_channels)
        self.mask = nn.Linear(channels, self.params.mask_channels)
        self.input_proj = nn.Linear(channels, channels)
        self.output_proj = nn.Linear(channels, channels)
        if center_feature_scale:
            self.center_feature_scale_proj_weight = nn.Parameter(torch.zeros(group, channels))
            self.center_feature_scale_proj_bias = nn.Parameter(torch.zeros(group))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise the linear layers as published: offsets and mask logits of zero."""
        for layer in (self.offset, self.mask):
            nn.init.zeros_(layer.weight)
        for layer in (self.input_proj, self.output_proj):
            nn.init.xavier_uniform_(layer.weight)
        for layer in (self.offset, self.mask, self.input_proj, self.output_proj):
            nn.init.zeros_(layer.bias)

    _reset_parameters = reset_parameters
    """Name by which the published InternImage calls it."""

    def forward(self, x: Tensor) -> Tensor:
        """Transform (N, H, W, C)."""
        projected = self.input_proj(x)
        convolved = self.dw_conv[0](x.permute(0, 3, 1, 2))
        compute = self.offsets_and_logits
        if self.recompute:
            compute = functools.partial(recomputed, compute)
        local, offset, logits = compute(convolved)
        y = self.sample(projected, offset, logits)
        if self.center_feature_scale:
            gate = torch.sigmoid(
                F.linear(
                    local,
                    self.center_feature_scale_proj_weight,
                    self.center_feature_scale_proj_bias,
                )
            )
            gate = gate.repeat_interleave(self.group_channels, dim=-1)
            y = y * (1 - gate) + projected * gate
        result: Tensor = self.output_proj(y)
        return result

    def offsets_and_logits(self, convolved: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return local features, offsets, and logits of the mask."""
        local = self.dw_conv[2](self.dw_conv[1](convolved))
        return local, self.offset(local), self.mask(local)

    def sample(self, x: Tensor, offset: Tensor, logits: Tensor) -> Tensor:
        """Sample the projected input, with the softmax of the logits; subclasses may override it.

        In training the operator applies the softmax: PyTorch's, over so few points, takes more than
        half as long as the operator and its gradients.
        """
        inside = self.params.softmax or self.training
        mask = logits if inside else softmax_over_points(logits, self.params)
        return torch_op.dcnv3(x, offset, mask, **(self.params.keywords() | {"softmax": inside}))


def softmax_over_points(logits: Tensor, params: DCNv3Params) -> Tensor:
    """Return the weights of the mask for logits of shape (N, Ho, Wo, group*P)."""
    grouped = torch.unflatten(logits, -1, (params.group, -1))
    return torch.softmax(grouped, dim=-1).flatten(-2)


def _check_padding(kernel_size: int, pad: int, dilation: int) -> None:
    """Check that a convolution of stride 1 keeps height and width."""
    added = dilation * (kernel_size - 1)
    if 2 * pad != added:
        raise InvalidArgumentError(
            "the padding does not keep height and width, so that offset and mask would have "
            "another size than the result",
            got=f"kernel_size={kernel_size}, pad={pad}, dilation={dilation}",
            allowed="2*pad == dilation*(kernel_size - 1)",
            hint=f"Use pad={added // 2}." if added % 2 == 0 else "Use an odd kernel_size.",
        )


def _named(argument: str, name: str, layers: dict[str, LayerT]) -> LayerT:
    if name not in layers:
        raise InvalidArgumentError(
            f"{argument} is unknown", got=repr(name), allowed=", ".join(map(repr, layers))
        )
    return layers[name]
