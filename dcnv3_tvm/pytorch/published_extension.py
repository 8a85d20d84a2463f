"""The functions of the published CUDA extension ``DCNv3``, computed by this library's operator.

The published code (OpenGVLab/InternImage, ``ops_dcnv3``) and its forks call a compiled module named
``DCNv3``. These functions take the same arguments, on the CPU and on GPUs. Version 1.0 of the
extension has no `remove_center`, version 1.1 has.

``im2col_step``, the images that the extension processes at once, is ignored: any batch is accepted.
Shapes, dtypes and devices are checked; the extension reads outside of wrong ones.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dcnv3_tvm.errors import InvalidArgumentError
from dcnv3_tvm.pytorch import operator as torch_op
from dcnv3_tvm.spec import DCNv3Params


def dcnv3_forward(
    input: Tensor,  # noqa: A002
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
    im2col_step: int,
    remove_center: int = 0,
) -> Tensor:
    """Compute DCNv3.

    Parameters
    ----------
    input, offset, mask : torch.Tensor
        Shapes (N, H, W, C), (N, Ho, Wo, group*P*2) and (N, Ho, Wo, group*P). Their floating-point
        dtypes may differ, as autocast makes them.
    kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w : int
        As for a convolution.
    group, group_channels : int
        Groups and channels per group; C is their product.
    offset_scale : float
        Factor on grid and offsets.
    im2col_step : int
        Ignored.
    remove_center : bool
        Leave out the central point.

    Returns
    -------
    torch.Tensor
        Shape (N, Ho, Wo, C), of the dtype of `input`.

    Raises
    ------
    InvalidArgumentError
        If a tensor has the wrong shape, dtype or device, or a parameter is not valid.
    """
    del im2col_step
    params = published_params(
        *(kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w),
        *(group, group_channels, offset_scale, remove_center),
    )
    _check_tensors({"input": input, "offset": offset, "mask": mask}, group, group_channels)
    return torch_op.dcnv3(input, offset, mask, **params.keywords())


def dcnv3_backward(
    input: Tensor,  # noqa: A002
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
    grad_output: Tensor,
    im2col_step: int,
    remove_center: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the gradients of DCNv3.

    Parameters
    ----------
    grad_output : torch.Tensor
        Gradient of the result, shape (N, Ho, Wo, C).
    input, offset, mask, kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, dilation_h, \
dilation_w, group, group_channels, offset_scale, im2col_step, remove_center
        As for `dcnv3_forward`.

    Returns
    -------
    (torch.Tensor, torch.Tensor, torch.Tensor)
        Gradients of `input`, `offset` and `mask`, of their shapes and dtypes.

    Raises
    ------
    InvalidArgumentError
        As `dcnv3_forward`, and if `grad_output` does not have the shape of the result.
    """
    del im2col_step
    params = published_params(
        *(kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w),
        *(group, group_channels, offset_scale, remove_center),
    )
    tensors = {"input": input, "offset": offset, "mask": mask, "grad_output": grad_output}
    _check_tensors(tensors, group, group_channels)
    return torch_op.dcnv3_backward(grad_output, input, offset, mask, **params.keywords())


def published_params(
    kernel_h: Any,
    kernel_w: Any,
    stride_h: Any,
    stride_w: Any,
    pad_h: Any,
    pad_w: Any,
    dilation_h: Any,
    dilation_w: Any,
    group: Any,
    group_channels: Any,
    offset_scale: Any,
    remove_center: Any = 0,
) -> DCNv3Params:
    """Return the operator's parameters for the numbers of a published call.

    Raises
    ------
    InvalidArgumentError
        If one is out of range or has the wrong type.
    """
    del group_channels
    return DCNv3Params(
        group=group,
        kernel_size=(kernel_h, kernel_w),
        stride=(stride_h, stride_w),
        pad=(pad_h, pad_w),
        dilation=(dilation_h, dilation_w),
        offset_scale=offset_scale,
        remove_center=remove_center,
    )


def _check_tensors(tensors: dict[str, Any], group: int, group_channels: int) -> None:
    """Check that all are tensors of floats on one device, with these channels."""
    for name, tensor in tensors.items():
        if not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point():
            raise InvalidArgumentError(
                f"{name} is not a tensor of floating-point numbers",
                got=tensor.dtype if isinstance(tensor, torch.Tensor) else type(tensor).__name__,
                allowed="float64, float32, float16 or bfloat16",
            )
    devices = {name: str(tensor.device) for name, tensor in tensors.items()}
    if len(set(devices.values())) > 1:
        raise InvalidArgumentError(
            "the tensors are on different devices",
            got=", ".join(f"{name}: {device}" for name, device in devices.items()),
            allowed="the same for all",
        )
    channels = tensors["input"].shape[-1]
    if channels != group * group_channels:
        raise InvalidArgumentError(
            "group and group_channels do not fit the channels of input",
            got=f"group={group}, group_channels={group_channels}, "
            f"input of shape {tuple(tensors['input'].shape)}",
            allowed="group * group_channels == C of (N, H, W, C)",
            hint="NHWC is expected: an NCHW tensor needs x.permute(0, 2, 3, 1).contiguous().",
        )
