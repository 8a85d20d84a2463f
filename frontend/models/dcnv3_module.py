"""The DCNv3 module: the deformable operator with the layers that compute its inputs."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dcnv3_tvm.errors import InvalidArgumentError
from dcnv3_tvm.frontend.models.layers import layer_norm_to_channels_last
from dcnv3_tvm.pytorch import operator as torch_op
from dcnv3_tvm.spec import DCNv3Params


class DCNv3(nn.Module):
    """Deformable convolution v3, (N, H, W, C) to (N, H, W, C).

    A depthwise convolution extracts local features, from which one linear layer computes the
    sampling offsets and another the modulation mask. Both start at zero, as published: without
    loaded weights the module samples the regular grid.

    Parameters
    ----------
    channels : int
        C, a multiple of `group`.
    group : int
        Channel groups; each has its own offsets and mask.
    kernel_size, dilation : int
        Of the deformable convolution; `kernel_size` is odd. Padding keeps H and W.
    dw_kernel_size : int or None
        Kernel of the depthwise convolution, odd; None for `kernel_size`.
    offset_scale : float
        Factor on the regular grid and on the offsets.
    center_feature_scale : bool
        Blend the sampled result with the projected input by a learned gate per group.
    remove_center : bool
        Leave out the central kernel point.

    Raises
    ------
    InvalidArgumentError
        If `group` does not divide `channels`, or a kernel size is even.
    """

    def __init__(
        self,
        channels: int,
        *,
        group: int,
        kernel_size: int = 3,
        dilation: int = 1,
        dw_kernel_size: int | None = None,
        offset_scale: float = 1.0,
        center_feature_scale: bool = False,
        remove_center: bool = False,
    ) -> None:
        super().__init__()
        dw_kernel_size = dw_kernel_size or kernel_size
        if channels % group or kernel_size % 2 == 0 or dw_kernel_size % 2 == 0:
            raise InvalidArgumentError(
                "the DCNv3 module has invalid sizes",
                got=f"channels={channels}, group={group}, kernel_size={kernel_size}, "
                f"dw_kernel_size={dw_kernel_size}",
                allowed="channels a multiple of group, and odd kernel sizes",
            )
        self.params = DCNv3Params(
            group=group,
            kernel_size=kernel_size,
            pad=dilation * (kernel_size - 1) // 2,
            dilation=dilation,
            offset_scale=offset_scale,
            remove_center=remove_center,
        )
        self.group_channels = channels // group
        self.center_feature_scale = center_feature_scale
        self.dw_conv = nn.Sequential(
            nn.Conv2d(
                channels,
                channels,
                dw_kernel_size,
                padding=(dw_kernel_size - 1) // 2,
                groups=channels,
            ),
            layer_norm_to_channels_last(channels),
            nn.GELU(),
        )
        self.offset = nn.Linear(channels, self.params.offset_channels)
        self.mask = nn.Linear(channels, self.params.mask_channels)
        self.input_proj = nn.Linear(channels, channels)
        self.output_proj = nn.Linear(channels, channels)
        if center_feature_scale:
            self.center_feature_scale_proj_weight = nn.Parameter(torch.zeros(group, channels))
            self.center_feature_scale_proj_bias = nn.Parameter(torch.zeros(group))

    def forward(self, x: Tensor) -> Tensor:
        """Transform (N, H, W, C)."""
        projected = self.input_proj(x)
        local = self.dw_conv(x.permute(0, 3, 1, 2))
        offset = self.offset(local)
        logits = self.mask(local).unflatten(-1, (self.params.group, -1))
        mask = torch.softmax(logits, dim=-1).flatten(-2)
        y = self.sample(projected, offset, mask)
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

    def sample(self, x: Tensor, offset: Tensor, mask: Tensor) -> Tensor:
        """Call the operator on the projected input; subclasses may override it."""
        return torch_op.dcnv3(x, offset, mask, **self.params.keywords())
