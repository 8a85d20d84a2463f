"""A layer, and its training in a group of processes, which import this module."""

from __future__ import annotations

from typing import Final

import torch

from dcnv3_tvm.pytorch.operator import dcnv3
from dcnv3_tvm.spec import DCNv3Keywords

PARAMETERS: Final[DCNv3Keywords] = {"group": 2, "offset_scale": 1.5, "softmax": True}


class ScaledLayer(torch.nn.Module):
    """The sum of the operator on scaled images of 8 channels."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(8))

    def forward(self, x: torch.Tensor, offset: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Compute the loss."""
        return dcnv3(x * self.scale, offset, mask, **PARAMETERS).sum()


def train_in_group(rank: int, folder: str, tensors: tuple[torch.Tensor, ...]) -> None:
    """Run one step of a process of two, each with one image; saves the gradient."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2
    )
    model = torch.nn.parallel.DistributedDataParallel(ScaledLayer())
    model(*(tensor[rank : rank + 1] for tensor in tensors)).backward()
    torch.save(model.module.scale.grad, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()
