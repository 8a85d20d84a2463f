"""Layers of the DCNv3 module that InternImage also uses, nested as the published keys need."""

from __future__ import annotations

from typing import Final

from torch import Tensor, nn

NORM_EPS: Final = 1e-6


class ToChannelsLast(nn.Module):
    """View (N, C, H, W) as (N, H, W, C)."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the permuted view."""
        return x.permute(0, 2, 3, 1)


def layer_norm_to_channels_last(channels: int) -> nn.Sequential:
    """LayerNorm over the channels of (N, C, H, W), returned as (N, H, W, C) (keys ``1.*``)."""
    return nn.Sequential(ToChannelsLast(), nn.LayerNorm(channels, eps=NORM_EPS))


def batch_norm_to_channels_last(channels: int) -> nn.Sequential:
    """BatchNorm of (N, C, H, W), returned as (N, H, W, C) (keys ``0.*``)."""
    return nn.Sequential(nn.BatchNorm2d(channels), ToChannelsLast())
