"""DCNv3 as ONNX's DeformConv, for a model rewritten for ONNX Runtime.

DeformConv with one filter of ones per channel computes DCNv3 from reordered offsets. The operator
defined here can only be exported; it computes nothing in PyTorch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor, nn

from dcnv3_tvm.errors import InvalidArgumentError
from dcnv3_tvm.spec import DCNv3Params
from dcnv3_tvm.verify.pytorch_reference import with_sampling

_NAME: Final = "dcnv3_tvm_bench::deform_conv"
_SCHEMA: Final = (
    "(Tensor x, Tensor weight, Tensor offset, Tensor bias, Tensor mask, int[2] kernel, "
    "int[2] stride, int[2] pad, int[2] dilation, int group) -> Tensor"
)


def with_deform_conv(module: nn.Module) -> nn.Module:
    """Copy a module of `dcnv3_tvm.verify.pytorch_reference`, with DeformConv for the sampling."""
    return with_sampling(module, _deform_conv)


def _deform_conv(x: Tensor, offset: Tensor, mask: Tensor, params: DCNv3Params) -> Tensor:
    if params.remove_center:
        raise InvalidArgumentError("DeformConv does not support remove_center", got=params)
    (kernel_h, kernel_w), (dilation_h, dilation_w) = params.kernel_size, params.dilation
    channels = x.shape[-1]
    batch, height, width, _ = offset.shape
    # DCNv3 orders points by column with x first, DeformConv by row with y first.
    moved = offset.reshape(batch, height, width, params.group, kernel_w, kernel_h, 2)
    moved = torch.stack([moved[..., 1], moved[..., 0]], dim=-1) * params.offset_scale
    if params.offset_scale != 1.0:
        rows = torch.arange(kernel_h) * dilation_h - dilation_h * (kernel_h - 1) // 2
        columns = torch.arange(kernel_w) * dilation_w - dilation_w * (kernel_w - 1) // 2
        grid = torch.stack(torch.meshgrid(columns, rows, indexing="ij")[::-1], dim=-1)
        moved = moved + (params.offset_scale - 1.0) * grid
    moved = moved.permute(0, 3, 5, 4, 6, 1, 2).reshape(batch, -1, height, width)
    weights = mask.reshape(batch, height, width, params.group, kernel_w, kernel_h)
    weights = weights.permute(0, 3, 5, 4, 1, 2).reshape(batch, -1, height, width)
    y = torch.ops.dcnv3_tvm_bench.deform_conv(
        x.permute(0, 3, 1, 2),
        x.new_ones(channels, 1, kernel_h, kernel_w),
        moved,
        x.new_zeros(channels),
        weights,
        params.kernel_size,
        params.stride,
        params.pad,
        params.dilation,
        params.group,
    )
    result: Tensor = y.permute(0, 2, 3, 1)
    return result


def translations() -> dict[Any, Callable[..., Any]]:
    """Return the exporter's ``custom_translation_table`` for the operator."""
    from onnxscript import opset20

    def deform_conv(
        x: Any,
        weight: Any,
        offset: Any,
        bias: Any,
        mask: Any,
        kernel: Any,
        stride: Any,
        pad: Any,
        dilation: Any,
        group: Any,
    ) -> Any:
        return opset20.DeformConv(
            x,
            weight,
            offset,
            bias,
            mask,
            kernel_shape=list(kernel),
            strides=list(stride),
            pads=[*pad, *pad],
            dilations=list(dilation),
            group=weight.shape[0],
            offset_group=group,
        )

    return {torch.ops.dcnv3_tvm_bench.deform_conv.default: deform_conv}


def _shape(
    x: Tensor, _weight: Tensor, _offset: Tensor, _bias: Tensor, mask: Tensor, *_: Any
) -> Tensor:
    return x.new_empty(x.shape[0], x.shape[1], *mask.shape[2:])


def _register() -> None:
    # PyTorch's operator registry outlives a reload of this module.
    if hasattr(torch.ops.dcnv3_tvm_bench, "deform_conv"):
        return
    torch.library.define(_NAME, _SCHEMA)
    torch.library.register_fake(_NAME)(_shape)


_register()
