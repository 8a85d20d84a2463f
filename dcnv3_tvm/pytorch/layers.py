"""Layers of the DCNv3 module that InternImage also uses, nested as the published keys need."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

ResultT = TypeVar("ResultT")

NORM_EPS: Final = 1e-6


def recomputed(function: Callable[[Tensor], ResultT], x: Tensor) -> ResultT:
    """Call a function, whose intermediate results backward computes again instead of keeping them.

    What nothing but the last results depends on is not computed again. ``torch.compile`` decides
    itself what to keep; ``torch.func`` keeps everything.
    """
    plain = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
    if plain or not torch.is_grad_enabled():
        return function(x)
    result: ResultT = checkpoint(function, x, use_reentrant=False, preserve_rng_state=False)
    return result


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
