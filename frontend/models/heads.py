"""The two classification heads of InternImage."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dcnv3_tvm.frontend.models.layers import layer_norm


def convolution_head(channels: int, output_channels: int) -> nn.Sequential:
    """1x1 convolution, BatchNorm and GELU on (N, C, H, W), before average pooling (T to XL)."""
    return nn.Sequential(
        nn.Conv2d(channels, output_channels, kernel_size=1, bias=False),
        nn.Sequential(nn.BatchNorm2d(output_channels)),
        nn.GELU(),
    )


class AttentionPooling(nn.Module):
    """Pool tokens by attention, with their mean as the only query (H and G).

    Parameters
    ----------
    channels, output_channels, heads : int
        As in `CrossAttention`.
    """

    def __init__(self, channels: int, output_channels: int, heads: int) -> None:
        super().__init__()
        self.norm1_q = layer_norm(channels)
        self.norm1_k = layer_norm(channels)
        self.norm1_v = layer_norm(channels)
        # The published key; nothing in it is deformable.
        self.cross_dcn = CrossAttention(channels, output_channels, heads)

    def forward(self, tokens: Tensor) -> Tensor:
        """Pool (N, T, C) to (N, output_channels)."""
        query = tokens.mean(1, keepdim=True)
        pooled: Tensor = self.cross_dcn(
            self.norm1_q(query), self.norm1_k(tokens), self.norm1_v(tokens)
        )
        return pooled.squeeze(1)


class CrossAttention(nn.Module):
    """Multi-head attention; the biases of q, k and v are parameters next to the linear layers.

    Parameters
    ----------
    channels, output_channels : int
        Channels of the tokens and of the result.
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
        """Attend from (N, Tq, C) to (N, T, C); return (N, Tq, output_channels)."""
        q = self._split_heads(F.linear(query, self.q.weight, self.q_bias))
        k = self._split_heads(F.linear(key, self.k.weight, self.k_bias))
        v = self._split_heads(F.linear(value, self.v.weight, self.v_bias))
        q = q * q.shape[-1] ** -0.5
        attention = torch.softmax(q @ k.transpose(-2, -1), dim=-1)
        result: Tensor = self.proj((attention @ v).transpose(1, 2).flatten(2))
        return result

    def _split_heads(self, tokens: Tensor) -> Tensor:
        """Reshape (N, T, C) to (N, heads, T, C / heads)."""
        batch, count, _ = tokens.shape
        return tokens.reshape(batch, count, self.heads, -1).transpose(1, 2)
