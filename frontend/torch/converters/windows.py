"""Converters of operators over sliding windows: pooling and unfold."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Final

import numpy as np
from torch.fx import Node
from tvm import relax

from dcnv3_tvm.frontend.torch.fx_nodes import constant, node_arguments, unsupported, uses_result
from dcnv3_tvm.transform.ir import dimensions


def _max_pool(node: Node, importer: Any) -> relax.Var:
    # TVM's converter fails where the stride is left out before other arguments.
    args = node_arguments(node, importer)
    x, window = args["self"], args["kernel_size"]
    batched = x if x.ty.ndim == 4 else relax.op.expand_dims(x, 0)
    result = relax.op.nn.max_pool2d(
        batched,
        window,
        strides=args["stride"] or window,
        padding=args["padding"],
        dilation=args["dilation"],
        ceil_mode=args["ceil_mode"],
    )
    return importer.block_builder.emit(
        result if x.ty.ndim == 4 else relax.op.squeeze(importer.block_builder.emit(result), [0])
    )


def _average_pool(node: Node, importer: Any) -> relax.Var:
    # TVM's converter ignores divisor_override.
    if node_arguments(node, importer)["divisor_override"] is not None:
        raise unsupported(
            "avg_pool2d with divisor_override is not supported",
            node,
            "Leave divisor_override out and multiply the result instead.",
        )
    return importer._avg_pool2d(node)


def _adaptive_max_pool(node: Node, importer: Any) -> relax.Var:
    # TVM has no converter.
    args = node_arguments(node, importer)
    x, output_size = args["self"], list(args["output_size"])
    if uses_result(node, 1):
        raise unsupported(
            "adaptive_max_pool2d with return_indices=True is not supported",
            node,
            "Use only its values.",
        )
    if output_size == [1, 1]:
        result = relax.op.max(x, [-2, -1], keepdims=True)
    else:
        size = dimensions(x)[-2:]
        divides = all(
            isinstance(old, int) and old % new == 0
            for old, new in zip(size, output_size, strict=True)
        )
        if not divides or x.ty.ndim != 4:
            raise unsupported(
                f"adaptive_max_pool2d from {tuple(map(str, size))} to {tuple(output_size)} has "
                "windows of different sizes, which is not supported",
                node,
                "Pool to (1, 1) or to a divisor of a fixed size, or use max_pool2d.",
            )
        window = [old // new for old, new in zip(size, output_size, strict=True)]
        result = relax.op.nn.max_pool2d(x, window, strides=window)
    values = importer.block_builder.emit(result)
    return importer.block_builder.emit(relax.Tuple([values, values]))


def _unfold(node: Node, importer: Any) -> relax.Var:
    # TVM has no converter. A grouped convolution with one-hot filters extracts the windows.
    args = node_arguments(node, importer)
    x, window = args["self"], args["kernel_size"]
    batch, channels, *_ = dimensions(x)
    filters = np.eye(math.prod(window)).reshape(-1, 1, *window)
    windows = importer.block_builder.emit(
        relax.op.nn.conv2d(
            x,
            constant(np.tile(filters, (channels, 1, 1, 1))),
            strides=args["stride"],
            padding=args["padding"],
            dilation=args["dilation"],
            groups=channels,
        )
    )
    rows = channels * math.prod(window)
    columns = math.prod(dimensions(windows)[2:])
    return importer.block_builder.emit(relax.op.reshape(windows, (batch, rows, columns)))


WINDOWS: Final[dict[str, Callable[[Node, Any], relax.Var]]] = {
    "adaptive_max_pool2d.default": _adaptive_max_pool,
    "avg_pool2d.default": _average_pool,
    "im2col.default": _unfold,
    "max_pool2d.default": _max_pool,
}
