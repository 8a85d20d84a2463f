"""Replacements for the published sampling functions that call this library's operator."""

from __future__ import annotations

from typing import Any, Final

from torch import Tensor

from dcnv3_tvm.checks import boolean, finite
from dcnv3_tvm.pytorch import operator as torch_op

CORE_NAME: Final = "dcnv3_core_pytorch"
"""The published fallback in PyTorch."""

FUNCTION_NAME: Final = "DCNv3Function"
"""The published autograd function around the CUDA extension."""


def core(
    input: Tensor,  # noqa: A002 the published name, which callers may use as a keyword
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
    remove_center: bool | int = False,
) -> Tensor:
    """Replace ``dcnv3_core_pytorch``; its oldest version has no `remove_center`."""
    del group_channels
    return torch_op.dcnv3(
        input,
        offset,
        mask,
        group=group,
        kernel_size=(kernel_h, kernel_w),
        stride=(stride_h, stride_w),
        pad=(pad_h, pad_w),
        dilation=(dilation_h, dilation_w),
        offset_scale=finite("offset_scale", offset_scale),
        remove_center=boolean("remove_center", remove_center),
    )


class Function:
    """Replaces ``DCNv3Function``."""

    @staticmethod
    def apply(*arguments: Any) -> Tensor:
        """Take the arguments of `core`, with ``im2col_step`` before `remove_center`."""
        common, (_im2col_step, *remove_center) = arguments[:14], arguments[14:]
        return core(*common, *remove_center)
