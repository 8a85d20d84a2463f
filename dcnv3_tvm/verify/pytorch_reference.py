"""DCNv3 with PyTorch's ``grid_sample``, as in the published CPU fallback.

Users without the CUDA extension run or export this implementation, so benchmarks compare with it.
It shares no code with this library's operator.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dcnv3_tvm.pytorch.dcnv3_module import DCNv3, softmax_over_points
from dcnv3_tvm.spec import DCNv3Params, DCNv3Spec

ModuleT = TypeVar("ModuleT", bound=nn.Module)

Sampling = Callable[[Tensor, Tensor, Tensor, DCNv3Params], Tensor]
"""Computes the operator from x, offset and mask."""


def dcnv3_core_pytorch(
    x: Tensor,
    offset: Tensor,
    mask: Tensor,
    kernel_h: int,
    kernel_w: int,
    stride_h: int,
    stride_w: int,
    pad_h: int,
    pad_w: int,
    dilation_h: int,
    dilation_w: int,
    group: int,
    group_channels: int,
    offset_scale: float,
    remove_center: bool = False,
) -> Tensor:
    """Sample all points of all groups with one ``grid_sample``.

    Name and signature are the published ones.

    Parameters
    ----------
    x, offset, mask : torch.Tensor
        Shapes (N, H, W, C), (N, Ho, Wo, group*P*2) and (N, Ho, Wo, group*P), of one dtype.
    kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w : int
        As for a convolution.
    group, group_channels : int
        Groups and channels per group; C is their product.
    offset_scale : float
        Factor applied to grid and offsets.
    remove_center : bool
        Skip the central point.

    Returns
    -------
    torch.Tensor
        Shape (N, Ho, Wo, C), contiguous.
    """
    batch, height, width, channels = x.shape
    out_height, out_width = offset.shape[1:3]
    # Create all tensors on the device of x: copies from the host would stall a GPU.
    arange = partial(torch.arange, dtype=x.dtype, device=x.device)
    points = kernel_w * kernel_h - int(remove_center)
    places = torch.arange(points, device=x.device)
    if remove_center:
        places = places + (places >= kernel_w // 2 * kernel_h + kernel_h // 2)
    pixels = out_height * out_width

    half_w, half_h = dilation_w * (kernel_w - 1) // 2, dilation_h * (kernel_h - 1) // 2
    across = (places // kernel_h).to(x.dtype) * dilation_w - half_w
    down = (places % kernel_h).to(x.dtype) * dilation_h - half_h
    grid = torch.stack([across, down], dim=-1) * offset_scale
    columns = arange(out_width) * stride_w + (half_w - pad_w)
    rows = arange(out_height) * stride_h + (half_h - pad_h)
    centres = torch.stack(torch.meshgrid(rows, columns, indexing="ij")[::-1], dim=-1)
    fixed = (centres[:, :, None, None] + grid).reshape(1, pixels, 1, points, 2)

    moved = fixed + offset.reshape(batch, pixels, group, points, 2) * offset_scale
    # grid_sample takes coordinates in [-1, 1], from edge to edge of the image.
    extent = arange(2) * (height - width) + width
    normalised = (2 * moved + 1) / extent - 1
    normalised = normalised.transpose(1, 2).reshape(batch * group, pixels, points, 2)
    maps = x.reshape(batch, height * width, channels).transpose(1, 2)
    maps = maps.reshape(batch * group, group_channels, height, width)
    sampled = F.grid_sample(
        maps, normalised, mode="bilinear", padding_mode="zeros", align_corners=False
    )
    weights = mask.reshape(batch, pixels, group, points).transpose(1, 2)
    weights = weights.reshape(batch * group, 1, pixels, points)
    total = (sampled * weights).sum(-1).reshape(batch, channels, pixels)
    return total.transpose(1, 2).reshape(batch, out_height, out_width, channels).contiguous()


def grid_sampling(x: Tensor, offset: Tensor, mask: Tensor, params: DCNv3Params) -> Tensor:
    """Call `dcnv3_core_pytorch` with the parameters of an operator."""
    arguments: tuple[Any, ...] = (
        *(*params.kernel_size, *params.stride, *params.pad, *params.dilation),
        *(params.group, x.shape[-1] // params.group, params.offset_scale, params.remove_center),
    )
    return dcnv3_core_pytorch(x, offset, mask, *arguments)


def float32_sampling(x: Tensor, offset: Tensor, mask: Tensor, params: DCNv3Params) -> Tensor:
    """Call `grid_sampling` in float32, in which the published code computes it under autocast."""
    return grid_sampling(x.float(), offset.float(), mask.float(), params)


class PyTorchOperator(nn.Module):
    """A DCNv3 operator as a PyTorch module of ``(x, offset, mask)``.

    Parameters
    ----------
    spec : DCNv3Spec
        The problem; its mask holds weights, not logits.
    """

    sampling: Sampling

    def __init__(self, spec: DCNv3Spec) -> None:
        super().__init__()
        self.spec = spec
        self.sampling = grid_sampling

    def forward(self, x: Tensor, offset: Tensor, mask: Tensor) -> Tensor:
        """Compute the operator."""
        return self.sampling(x, offset, mask, self.spec)


class PyTorchDCNv3(DCNv3):
    """The DCNv3 module with another implementation of the sampling."""

    sampling: Sampling

    def sample(self, x: Tensor, offset: Tensor, logits: Tensor) -> Tensor:
        """Sample the projected map."""
        return self.sampling(x, offset, softmax_over_points(logits, self.params), self.params)


def with_sampling(module: ModuleT, sampling: Sampling = grid_sampling) -> ModuleT:
    """Copy a module and replace the implementation of every DCNv3 operator.

    Parameters
    ----------
    module : torch.nn.Module
        An InternImage or a `PyTorchOperator`. Unchanged; the copy has its own weights.
    sampling : callable
        The implementation.
    """
    copied = copy.deepcopy(module)
    for part in copied.modules():
        if type(part) is DCNv3:
            part.__class__ = PyTorchDCNv3
        if isinstance(part, PyTorchDCNv3 | PyTorchOperator):
            part.sampling = sampling
    return copied
