"""Layers that the parts of InternImage share, nested as the published state-dict keys need."""

from __future__ import annotations

from typing import Final

from torch import Tensor, nn

NORM_EPS: Final = 1e-6


class ToChannelsFirst(nn.Module):
    """View (N, H, W, C) as (N, C, H, W)."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the permuted view."""
        return x.permute(0, 3, 1, 2)


class ToChannelsLast(nn.Module):
    """View (N, C, H, W) as (N, H, W, C)."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the permuted view."""
        return x.permute(0, 2, 3, 1)


class MLP(nn.Module):
    """Linear, GELU, Linear over the last axis."""

    def __init__(self, channels: int, hidden_channels: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(channels, hidden_channels)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden_channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """Transform (..., C) to (..., C)."""
        result: Tensor = self.fc2(self.act(self.fc1(x)))
        return result


def layer_norm(channels: int) -> nn.Sequential:
    """LayerNorm over the last axis (keys ``0.weight``, ``0.bias``)."""
    return nn.Sequential(nn.LayerNorm(channels, eps=NORM_EPS))


def layer_norm_to_channels_last(channels: int) -> nn.Sequential:
    """LayerNorm over the channels of (N, C, H, W), returned as (N, H, W, C) (keys ``1.*``)."""
    return nn.Sequential(ToChannelsLast(), nn.LayerNorm(channels, eps=NORM_EPS))
