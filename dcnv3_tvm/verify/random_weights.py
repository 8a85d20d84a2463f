"""Random weights that make every parameter of an InternImage matter."""

from __future__ import annotations

import math
from typing import TypeVar

import torch
from torch import Tensor, nn

ModuleT = TypeVar("ModuleT", bound=nn.Module)

# E[GELU(z)^2] for z ~ N(0, 1): the input power of a projection after LayerNorm and GELU.
_GELU_POWER = 0.42


def randomize_(module: ModuleT, seed: int = 0, *, offset_std: float = 1.0) -> ModuleT:
    """Initialise a model with random weights, in place.

    A newly created InternImage has zero offset and mask projections and, in most variants, a layer
    scale of 1e-5, which would hide an error of the operator. With these weights activations stay of
    order 1 through all stages. Any module with the published parameter names works, whatever their
    prefix.

    Parameters
    ----------
    module : torch.nn.Module
        The model; floating-point parameters on the CPU.
    seed : int
        Seed; the same seed and order of parameters give the same weights.
    offset_std : float
        Standard deviation of the learned offsets, in pixels before ``offset_scale``.

    Returns
    -------
    torch.nn.Module
        `module`.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, owner in module.named_modules():
            # Offset projections are recognised by the name of their module.
            role = name.rpartition(".")[2]
            for leaf, parameter in owner.named_parameters(recurse=False):
                _fill(parameter, owner, role, leaf, offset_std, generator)
            if isinstance(owner, nn.BatchNorm2d):
                if owner.running_mean is not None:
                    owner.running_mean.normal_(0.0, 0.2, generator=generator)
                if owner.running_var is not None:
                    owner.running_var.uniform_(0.5, 1.5, generator=generator)
    return module


def _fill(
    parameter: Tensor,
    owner: nn.Module,
    role: str,
    leaf: str,
    offset_std: float,
    generator: torch.Generator,
) -> None:
    """Fill one parameter according to its module and name."""
    norm = isinstance(owner, (nn.LayerNorm, nn.BatchNorm2d))
    if norm and leaf == "weight":
        parameter.uniform_(0.7, 1.3, generator=generator)
    elif leaf in ("gamma1", "gamma2", "layer_scale1", "layer_scale2"):
        parameter.uniform_(0.2, 0.6, generator=generator)
    elif parameter.ndim < 2:
        parameter.normal_(0.0, 0.1 if role != "offset" else 0.3 * offset_std, generator=generator)
    else:
        fan_in = math.prod(parameter.shape[1:])
        after_gelu = role in ("offset", "mask", "fc2", "head") or leaf.startswith("center")
        gain = offset_std if role == "offset" else 1.0
        std = gain / math.sqrt(fan_in * (_GELU_POWER if after_gelu else 1.0))
        parameter.normal_(0.0, std, generator=generator)
