"""The twin with another sampling in the place of ``grid_sample``."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import NamedTuple, TypeVar

from torch import Tensor, nn

from dcnv3_tvm.spec import DCNv3Spec
from dcnv3_tvm.verify.pytorch_reference import TwinDCNv3, TwinOperator

ModuleT = TypeVar("ModuleT", bound=nn.Module)


class Geometry(NamedTuple):
    """What of a `DCNv3Spec` does not depend on the tensors; pairs are (height, width)."""

    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    pad: tuple[int, int]
    dilation: tuple[int, int]
    group: int
    offset_scale: float
    remove_center: bool

    @classmethod
    def of(cls, spec: DCNv3Spec) -> Geometry:
        """Take it from a problem."""
        return cls(*(getattr(spec, name) for name in cls._fields))


Sample = Callable[[Tensor, Tensor, Tensor, Geometry], Tensor]
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
            part.prepare(sample)
    return copied


class _OtherOperator(TwinOperator):
    sampler: Sample
    geometry: Geometry

    def prepare(self, sample: Sample) -> None:
        self.sampler, self.geometry = sample, Geometry.of(self.spec)

    def forward(self, x: Tensor, offset: Tensor, mask: Tensor) -> Tensor:
        return self.sampler(x, offset, mask, self.geometry)


class _OtherDCNv3(TwinDCNv3):
    sampler: Sample
    geometry: Geometry

    def prepare(self, sample: Sample) -> None:
        self.sampler = sample
        self.geometry = Geometry(
            kernel_size=(self.kernel_size, self.kernel_size),
            stride=(self.stride, self.stride),
            pad=(self.pad, self.pad),
            dilation=(self.dilation, self.dilation),
            group=self.group,
            offset_scale=self.offset_scale,
            remove_center=self.remove_center,
        )

    def sample(self, x: Tensor, offset: Tensor, mask: Tensor) -> Tensor:
        return self.sampler(x, offset, mask, self.geometry)
