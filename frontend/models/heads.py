"""The two classification heads of InternImage, with the published names of their weights."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NORM_EPS = 1e-6


def norm(channels: int) -> nn.Sequential:
    """LayerNorm over the last axis, one level down, where the published keys have it."""
    return nn.Sequential(nn.LayerNorm(channels, eps=NORM_EPS))


class CrossAttention(nn.Module):
    """Multi-head attention whose q, k and v biases are parameters of their own.

    Parameters
    ----------
    channels, output_channels : int
        Width of the tokens, and of the result.
    heads : int
        Attention heads; divides `channels`.
    """

    def __init__(self, channels: int, output_channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(channels, channels, bias=False)
        self.k = nn.Linear(channels, channels, bias=False)
        self.v = nn.Linear(channels, channels, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(channels))
        self.k_bias = nn.Parameter(torch.zeros(channels))
        self.v_bias = nn.Parameter(torch.zeros(channels))
        self.proj = nn.Linear(channels, output_channels)

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attend with (N, Tq, C) over (N, T, C); return (N, Tq, output_channels)."""
        q = self._split(F.linear(query, self.q.weight, self.q_bias))
        k = self._split(F.linear(key, self.k.weight, self.k_bias))
        v = self._split(F.linear(value, self.v.weight, self.v_bias))
        q = q * q.shape[-1] ** -0.5
        attention = torch.softmax(q @ k.transpose(-2, -1), dim=-1)
        result: Tensor = self.proj((attention @ v).transpose(1, 2).flatten(2))
        return result

    def _split(self, tokens: Tensor) -> Tensor:
        batch, count, _ = tokens.shape
        return tokens.reshape(batch, count, self.heads, -1).transpose(1, 2)


class AttentionPooling(nn.Module):
    """Pool tokens with one attention query, their mean.

    Parameters
    ----------
    channels, output_channels, heads : int
        As of `CrossAttention`.
    """

    def __init__(self, channels: int, output_channels: int, heads: int) -> None:
        super().__init__()
        self.norm1_q = norm(channels)
        self.norm1_k = norm(channels)
        self.norm1_v = norm(channels)
        # Named so in the published weights, though nothing in it is deformable.
        self.cross_dcn = CrossAttention(channels, output_channels, heads)

    def forward(self, tokens: Tensor) -> Tensor:
        """Pool (N, T, C) to (N, output_channels)."""
        query = tokens.mean(1, keepdim=True)
        pooled: Tensor = self.cross_dcn(
            self.norm1_q(query), self.norm1_k(tokens), self.norm1_v(tokens)
        )
        return pooled.squeeze(1)


def convolution_head(channels: int, output_channels: int) -> nn.Sequential:
    """1x1 convolution, BatchNorm, GELU on (N, C, H, W), before the average pooling."""
    return nn.Sequential(
        nn.Conv2d(channels, output_channels, kernel_size=1, bias=False),
        nn.Sequential(nn.BatchNorm2d(output_channels)),
        nn.GELU(),
    )
