"""Converters of operators that move, repeat, select or pad elements."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Final

import numpy as np
from torch.fx import Node
from tvm import relax

from dcnv3_tvm.frontend.torch.fx_nodes import (
    constant,
    node_arguments,
    size_minus_one,
    size_tensor,
    unsupported,
)
from dcnv3_tvm.transform.ir import dimensions


def _pixel_shuffle(node: Node, importer: Any) -> relax.Var:
    # TVM has the Relax operator, but LegalizeOps has no kernel for it.
    args = node_arguments(node, importer)
    x, factor = args["self"], args["upscale_factor"]
    batch, channels, height, width = dimensions(x)
    output_channels = channels // (factor * factor)
    split = relax.op.reshape(x, (batch, output_channels, factor, factor, height, width))
    interleaved = relax.op.permute_dims(split, [0, 1, 4, 2, 5, 3])
    result = relax.op.reshape(
        interleaved, (batch, output_channels, height * factor, width * factor)
    )
    return importer.block_builder.emit(result)


def _meshgrid(node: Node, importer: Any) -> relax.Var:
    # TVM infers the shapes of indexing="ij" for "xy".
    args = node_arguments(node, importer)
    emit = importer.block_builder.emit
    tensors = [emit(relax.op.reshape(x, (-1,))) if x.ty.ndim == 0 else x for x in args["tensors"]]
    axes = list(range(len(tensors)))
    if args.get("indexing") == "xy":
        axes[:2] = axes[1::-1]
    shape = [dimensions(tensors[axis])[0] for axis in axes]
    grids = []
    for axis, x in zip(axes, tensors, strict=True):
        others = [each for each in range(len(tensors)) if each != axis]
        grids.append(emit(relax.op.broadcast_to(relax.op.expand_dims(x, others), shape)))
    return emit(relax.Tuple(grids))


def _repeat_interleave(node: Node, importer: Any) -> relax.Var:
    # TVM has no converter, and without one the whole program would have to be decomposed.
    args = node_arguments(node, importer)
    x, repeats, dim = (args[name] for name in ("self", "repeats", "dim"))
    emit = importer.block_builder.emit
    if dim is None:
        x, dim = emit(relax.op.reshape(x, (-1,))), 0
    axis = dim % x.ty.ndim
    shape = dimensions(x)
    before, size, after = shape[:axis], shape[axis], shape[axis + 1 :]
    expanded = emit(relax.op.expand_dims(x, axis + 1))
    repeated = emit(relax.op.broadcast_to(expanded, [*before, size, repeats, *after]))
    return emit(relax.op.reshape(repeated, [*before, size * repeats, *after]))


def _select(node: Node, importer: Any) -> relax.Var:
    # TVM's converter reads out of bounds for a negative index.
    args = node_arguments(node, importer)
    x, dim, index = args["self"], args["dim"], args["index"]
    size = dimensions(x)[dim]
    if isinstance(index, int) and index < 0:
        if isinstance(size, int):
            position = constant(size + index, "int64")
        else:
            last = size_minus_one(size, importer, "int64")
            position = relax.op.add(last, constant(index + 1, "int64"))
    else:
        position = constant(index, "int64")
    return importer.block_builder.emit(relax.op.take(x, position, axis=dim, mode="clip"))


def _slice(node: Node, importer: Any) -> relax.Var:
    # TVM does not know the size of a slice of fixed size of a dynamic axis, as of x[-1:].
    args = node_arguments(node, importer)
    x, step, axis = args["self"], args["step"], args["dim"]
    size, count = dimensions(x)[axis], node.meta["val"].shape[axis]
    start = args["start"] or 0
    if isinstance(size, int) or not isinstance(count, int) or not isinstance(start, int):
        return importer._slice(node)
    positions = constant(start + step * np.arange(count), "int64")
    if start < 0:
        length = size_tensor(size, importer, "int64")
        positions = importer.block_builder.emit(relax.op.add(length, positions))
    return importer.block_builder.emit(relax.op.take(x, positions, axis, "clip"))


def _pad(node: Node, importer: Any) -> relax.Var:
    # Relax pads by constants only.
    args = node_arguments(node, importer)
    if not all(isinstance(width, int) for width in args["pad"]):
        raise unsupported(
            "the padding depends on a dynamic size",
            node,
            "Pad the image before passing it to the model, or import with a fixed size.",
        )
    if args.get("mode") == "circular" and min(args["pad"]) < 0:
        raise unsupported(
            "circular padding by a negative width is not supported",  # TVM's result is wrong.
            node,
            "Cut the tensor by slicing.",
        )
    tvm_converter = importer._pad if "mode" in args else importer._constant_pad_nd
    return tvm_converter(node)


def _squeeze(node: Node, importer: Any) -> relax.Var:
    # TVM has no kernel for a squeeze of all axes of a tensor with dynamic sizes.
    x = node_arguments(node, importer)["self"]
    sizes = node.args[0].meta["val"].shape  # type: ignore[union-attr]
    single = [axis for axis, size in enumerate(sizes) if isinstance(size, int) and size == 1]
    return importer.block_builder.emit(relax.op.squeeze(x, single)) if single else x


def _sliding_windows(node: Node, importer: Any) -> relax.Var:
    # TVM has no converter.
    args = node_arguments(node, importer)
    x, axis, size, step = (args[name] for name in ("self", "dimension", "size", "step"))
    length, axis = dimensions(x)[axis], axis % x.ty.ndim
    if not isinstance(length, int):
        raise unsupported(
            "Tensor.unfold along a dynamic size is not supported",
            node,
            "Use torch.nn.functional.unfold, or import with a fixed size.",
        )
    starts = np.arange(0, length - size + 1, step)
    windows = relax.op.take(x, constant(starts[:, None] + np.arange(size), "int64"), axis, "clip")
    order = [each for each in range(x.ty.ndim + 1) if each != axis + 1] + [axis + 1]
    return importer.block_builder.emit(relax.op.permute_dims(windows, order))


def _roll(node: Node, importer: Any) -> relax.Var:
    # TVM's converter does not support dynamic shapes.
    args = node_arguments(node, importer)
    x, dims = args["self"], args["dims"]
    shape = dimensions(x)
    if not dims:
        x, dims = relax.op.reshape(x, (-1,)), [0]
    for shift, dim in zip(args["shifts"], dims, strict=True):
        size = math.prod(shape) if not args["dims"] else shape[dim]
        count = size_tensor(size, importer, "int64")
        indices = relax.op.subtract(relax.op.arange(0, size, 1, "int64"), constant(shift, "int64"))
        indices = importer.block_builder.emit(relax.op.floor_mod(indices, count))
        x = importer.block_builder.emit(relax.op.take(x, indices, axis=dim, mode="clip"))
    return importer.block_builder.emit(relax.op.reshape(x, shape))


DATA_MOVEMENT: Final[dict[str, Callable[[Node, Any], relax.Var]]] = {
    "constant_pad_nd.default": _pad,
    "meshgrid.default": _meshgrid,
    "meshgrid.indexing": _meshgrid,
    "pad.default": _pad,
    "pixel_shuffle.default": _pixel_shuffle,
    "repeat_interleave.self_int": _repeat_interleave,
    "roll.default": _roll,
    "select.int": _select,
    "slice.Tensor": _slice,
    "squeeze.default": _squeeze,
    "unfold.default": _sliding_windows,
}
