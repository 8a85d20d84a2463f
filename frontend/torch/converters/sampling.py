"""Converters of operators that sample a feature map at computed coordinates."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import torch
from torch.fx import Node
from tvm import relax

from dcnv3_tvm.frontend.torch.fx_nodes import node_arguments
from dcnv3_tvm.op import relax_op
from dcnv3_tvm.pytorch.registration import computed_dtype


def _dcnv3(node: Node, importer: Any) -> relax.Var:
    parameters = node_arguments(node, importer)
    tensors = [parameters.pop(name) for name in ("x", "offset", "mask")]
    types = [str(tensor.ty.dtype.dtype) for tensor in tensors]
    softmax = parameters["softmax"]
    dtype = computed_dtype(*(getattr(torch, name) for name in types), softmax=softmax)
    name = str(dtype).removeprefix("torch.")
    emit = importer.block_builder.emit
    x, offset, mask = (
        tensor if own == name else emit(relax.op.astype(tensor, name))
        for tensor, own in zip(tensors, types, strict=True)
    )
    result = emit(relax_op.dcnv3(x, offset, mask, **parameters))
    return result if types[0] == name else emit(relax.op.astype(result, types[0]))


def _grid_sample(node: Node, importer: Any) -> relax.Var:
    # TVM's converter passes the grid as (N, H, W, 2); its operator expects (N, 2, H, W).
    args = node_arguments(node, importer)
    result = relax.op.image.grid_sample(
        args["input"],
        relax.op.permute_dims(args["grid"], [0, 3, 1, 2]),
        method=("bilinear", "nearest", "bicubic")[args["interpolation_mode"]],
        layout="NCHW",
        padding_mode=("zeros", "border", "reflection")[args["padding_mode"]],
        align_corners=args["align_corners"],
    )
    return importer.block_builder.emit(result)


SAMPLING: Final[dict[str, Callable[[Node, Any], relax.Var]]] = {
    "dcnv3.default": _dcnv3,
    "grid_sampler_2d.default": _grid_sample,
}
