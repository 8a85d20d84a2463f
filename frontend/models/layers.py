"""Layers that the parts of InternImage share, nested as the published state-dict keys need."""

from __future__ import annotations

from torch import Tensor, nn

from dcnv3_tvm.pytorch.layers import NORM_EPS


class ToChannelsFirst(nn.Module):
    """View (N, H, W, C) as (N, C, H, W)."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the permuted view."""
        return x.permute(0, 3, 1, 2)


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
