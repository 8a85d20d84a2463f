"""The twin with another sampling in the place of ``grid_sample``."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TypeVar

from torch import Tensor, nn

from dcnv3_tvm.spec import DCNv3Params
from dcnv3_tvm.verify.pytorch_reference import TwinDCNv3, TwinOperator

ModuleT = TypeVar("ModuleT", bound=nn.Module)


Sample = Callable[[Tensor, Tensor, Tensor, DCNv3Params], Tensor]
"""Computes the operator from x, offset and mask."""


def sampling_by(module: ModuleT, sample: Sample) -> ModuleT:
    """Copy a module that holds twins, with another sampling.

    Parameters
    ----------
    module : torch.nn.Module
        A `TwinOperator`, or an encoder of `twin_of`. Unchanged; its weights are shared.
    sample : callable
        What computes the operator.
    """
    tensors = [*module.parameters(), *module.buffers()]
    copied = copy.deepcopy(module, {id(tensor): tensor for tensor in tensors})
    for part in copied.modules():
        if type(part) is TwinDCNv3:
            part.__class__ = _OtherDCNv3
        elif type(part) is TwinOperator:
            part.__class__ = _OtherOperator
        if isinstance(part, _OtherDCNv3 | _OtherOperator):
            part.sampler = sample
    return copied


class _OtherOperator(TwinOperator):
    sampler: Sample

    def forward(self, x: Tensor, offset: Tensor, mask: Tensor) -> Tensor:
        return self.sampler(x, offset, mask, self.spec)


class _OtherDCNv3(TwinDCNv3):
    sampler: Sample

    def sample(self, x: Tensor, offset: Tensor, mask: Tensor) -> Tensor:
        return self.sampler(x, offset, mask, self.params)
