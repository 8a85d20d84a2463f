"""DCNv3 by PyTorch's ``grid_sample``, in the manner of the published fallback for the CPU.

This is what people run who have no CUDA extension, and what they export to other runtimes:
benchmarks compare with it, and tests import it. It shares nothing with this library's operator.
"""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dcnv3_tvm.frontend.models.dcnv3_module import DCNv3
from dcnv3_tvm.frontend.models.internimage import InternImage
from dcnv3_tvm.spec import DCNv3Params, DCNv3Spec


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
    """Sample all points of all groups with one ``grid_sample``; the published name and signature.

    Parameters
    ----------
    x, offset, mask : torch.Tensor
        Shapes (N, H, W, C), (N, Ho, Wo, group*P*2) and (N, Ho, Wo, group*P), of one dtype.
    kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w : int
        As of a convolution.
    group, group_channels : int
        Their product is C.
    offset_scale : float
        Factor on grid and offsets.
    remove_center : bool
        Leave out the central point.

    Returns
    -------
    torch.Tensor
        Shape (N, Ho, Wo, C), contiguous.
    """
    batch, height, width, channels = x.shape
    out_height, out_width = offset.shape[1:3]
    # Everything is made where x is: what a GPU would have to copy from the host would hold it up.
    numbers = partial(torch.arange, dtype=x.dtype, device=x.device)
    points = kernel_w * kernel_h - int(remove_center)
    places = torch.arange(points, device=x.device)
    if remove_center:
        places = places + (places >= kernel_w // 2 * kernel_h + kernel_h // 2)
    pixels = out_height * out_width

    half_w, half_h = dilation_w * (kernel_w - 1) // 2, dilation_h * (kernel_h - 1) // 2
    across = (places // kernel_h).to(x.dtype) * dilation_w - half_w
    down = (places % kernel_h).to(x.dtype) * dilation_h - half_h
    grid = torch.stack([across, down], dim=-1) * offset_scale
    columns = numbers(out_width) * stride_w + (half_w - pad_w)
    rows = numbers(out_height) * stride_h + (half_h - pad_h)
    centres = torch.stack(torch.meshgrid(rows, columns, indexing="ij")[::-1], dim=-1)
    fixed = (centres[:, :, None, None] + grid).reshape(1, pixels, 1, points, 2)

    moved = fixed + offset.reshape(batch, pixels, group, points, 2) * offset_scale
    # grid_sample measures from -1 to 1, between the outer edges of the outer pixels.
    extent = numbers(2) * (height - width) + width
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


class TwinOperator(nn.Module):
    """A DCNv3 problem as a PyTorch module of ``(x, offset, mask)``.

    Parameters
    ----------
    spec : DCNv3Spec
        The problem; its mask is ready, not logits.
    """

    def __init__(self, spec: DCNv3Spec) -> None:
        super().__init__()
        self.spec = spec

    def forward(self, x: Tensor, offset: Tensor, mask: Tensor) -> Tensor:
        """Sample."""
        return dcnv3_core_pytorch(x, offset, mask, *_published_arguments(self.spec, x))


class TwinDCNv3(DCNv3):
    """The module of this library with the sampling of `dcnv3_core_pytorch`."""

    def sample(self, x: Tensor, offset: Tensor, mask: Tensor) -> Tensor:
        """Sample the projected map."""
        return dcnv3_core_pytorch(x, offset, mask, *_published_arguments(self.params, x))


def _published_arguments(params: DCNv3Params, x: Tensor) -> tuple[Any, ...]:
    """Return the arguments of `dcnv3_core_pytorch` after the tensors."""
    extents = (*params.kernel_size, *params.stride, *params.pad, *params.dilation)
    group_channels = x.shape[-1] // params.group
    return *extents, params.group, group_channels, params.offset_scale, params.remove_center


def twin_of(model: InternImage) -> InternImage:
    """Copy an InternImage with every operator replaced by ``grid_sample``.

    Parameters
    ----------
    model : InternImage
        Unchanged.

    Returns
    -------
    InternImage
        With the same weights, in memory of its own.
    """
    twin = copy.deepcopy(model)
    for part in twin.modules():
        if type(part) is DCNv3:
            part.__class__ = TwinDCNv3
    return twin
