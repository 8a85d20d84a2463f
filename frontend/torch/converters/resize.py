"""Converters of interpolation.

TVM's converters do not support dynamic sizes, and pick other pixels than PyTorch for ``nearest``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple, cast

import torch
from torch._ops import OpOverload
from torch.fx import Node
from tvm import relax

from dcnv3_tvm.frontend.torch.fx_nodes import constant, node_arguments, unsupported
from dcnv3_tvm.transform.ir import dimensions


class _Method(NamedTuple):
    """Arguments of ``relax.op.image.resize2d`` for a PyTorch mode with align_corners=False."""

    method: str
    coordinates: str = "half_pixel"
    rounding: str = ""


_METHODS: Final = {
    "upsample_nearest2d": _Method("nearest_neighbor", "asymmetric", "floor"),
    "_upsample_nearest_exact2d": _Method("nearest_neighbor", "half_pixel", "round_prefer_ceil"),
    "upsample_bilinear2d": _Method("linear"),
    "upsample_bicubic2d": _Method("cubic"),
}


def _resize(method: _Method) -> Callable[[Node, Any], relax.Var]:
    def converter(node: Node, importer: Any) -> relax.Var:
        args = node_arguments(node, importer)
        x = args["input"] if "input" in args else args["self"]
        align_corners = bool(args.get("align_corners"))
        scales = args.get("scale_factors") or [args.get("scales_h"), args.get("scales_w")]
        size = _output_size(node, x, args["output_size"], scales, align_corners)
        if size is None:
            return _resize_axes(node, importer)
        dynamic_to_fixed = any(
            isinstance(new, int) and not isinstance(old, int)
            for old, new in zip(dimensions(x)[-2:], size, strict=True)
        )
        if method.rounding == "floor" and dynamic_to_fixed:
            raise unsupported(
                'interpolation with mode="nearest" from a dynamic to a fixed size is not supported',
                node,
                'Use mode="nearest-exact" or "bilinear".',
            )
        if align_corners and not all(isinstance(new, int) for new in size):
            raise unsupported(
                "interpolation with align_corners=True to a dynamic size is not supported",
                node,
                "Use align_corners=False, or import with a fixed size.",
            )
        # For one output pixel TVM divides by zero. The first of two is the same pixel.
        single = [axis for axis, new in enumerate(size, 2) if align_corners and new == 1]
        result = relax.op.image.resize2d(
            x,
            tuple(2 if axis in single else new for axis, new in enumerate(size, 2)),
            layout="NCHW",
            method=method.method,
            coordinate_transformation_mode="align_corners" if align_corners else method.coordinates,
            rounding_method=method.rounding,
            cubic_alpha=-0.75,
        )
        for axis in single:
            result = relax.op.strided_slice(importer.block_builder.emit(result), [axis], [0], [1])
        return importer.block_builder.emit(result)

    return converter


def _output_size(
    node: Node,
    x: relax.Expr,
    size: Sequence[Any] | None,
    scales: Sequence[Any],
    align_corners: bool,
) -> tuple[Any, ...] | None:
    """Return the output (height, width).

    Relax derives the scale from the two sizes. PyTorch uses the given scale factor, which differs
    where the output size was rounded down: then the result is None if the sizes are fixed.
    """
    old = dimensions(x)[-2:]
    new = list(size) if size is not None else list(map(_scaled_size, old, scales))
    if None in new or not (align_corners or all(map(_is_exact, old, new, scales))):
        if all(isinstance(each, int) for each in old):
            return None
        raise unsupported(
            f"interpolation of size {tuple(map(str, old))} by scale_factor={tuple(scales)} does "
            "not give a whole number of pixels",
            node,
            "Give the output size, an integer scale_factor, or recompute_scale_factor=True.",
        )
    return tuple(new)


def _scaled_size(size: Any, scale: float) -> Any:
    if isinstance(size, int):
        return math.floor(size * scale)
    return size * int(scale) if scale.is_integer() else None


def _is_exact(old: Any, new: Any, scale: float | None) -> bool:
    return scale is None or scale.is_integer() or (isinstance(old, int) and old * scale == new)


def _resize_axes(node: Node, importer: Any) -> relax.Var:
    """Resize one axis after the other, with the weights that PyTorch gives to unit vectors."""
    args = node_arguments(node, importer)
    x = args["input"] if "input" in args else args["self"]
    old, new = dimensions(x)[-2:], node.meta["val"].shape[-2:]
    if not all(isinstance(size, int) for size in old):
        raise unsupported(
            "interpolation of a dynamic size with antialias=True is not supported",
            node,
            "Leave antialias=True out, or import with a fixed size.",
        )
    options = {name: args[name] for name in ("align_corners",) if name in args}
    scales = args.get("scale_factors") or [args.get("scales_h"), args.get("scales_w")]
    resize = cast("OpOverload", node.target).overloadpacket.default
    for axis in (0, 1):
        if old[axis] == new[axis] and scales[axis] in (None, 1):
            continue
        # As rows: PyTorch's antialiased kernels are wrong for columns of one pixel.
        units = torch.eye(old[axis]).reshape(1, old[axis], 1, old[axis])
        resized = resize(units, [1, new[axis]], **options, scales_h=None, scales_w=scales[axis])
        weights = resized.reshape(old[axis], new[axis])
        if "nearest" in str(node.target):
            x = relax.op.take(x, constant(weights.argmax(0), "int64"), axis + 2, "clip")
        elif axis == 0:
            x = relax.op.matmul(constant(weights.T), x)
        else:
            x = relax.op.matmul(x, constant(weights))
        x = importer.block_builder.emit(x)
    return x


def _resize_antialiased(node: Node, importer: Any) -> relax.Var:
    # The anti-aliasing filter has no effect on bilinear enlargement.
    args = node_arguments(node, importer)
    x, size = args["input" if "input" in args else "self"], args["output_size"]
    enlarges = size is not None and all(
        isinstance(old, int) and isinstance(new, int) and new >= old
        for old, new in zip(dimensions(x)[-2:], size, strict=True)
    )
    return (_resize(_METHODS["upsample_bilinear2d"]) if enlarges else _resize_axes)(node, importer)


RESIZE: Final[dict[str, Callable[[Node, Any], relax.Var]]] = {
    f"{name}.{overload}": converter
    for name, converter in (
        *((name, _resize(method)) for name, method in _METHODS.items()),
        ("_upsample_bicubic2d_aa", _resize_axes),
        ("_upsample_bilinear2d_aa", _resize_antialiased),
    )
    for overload in ("default", "vec")
}
