"""Converters of interpolation, by the names of their nodes.

TVM's own take no open sizes, and choose other pixels than PyTorch for the nearest.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple

from torch.fx import Node
from tvm import relax

from dcnv3_tvm.frontend.torch.nodes import arguments, refused, sizes


class _Method(NamedTuple):
    """How Relax calls what PyTorch computes where corners are not aligned."""

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
        given = arguments(node, importer)
        x = given["input"] if "input" in given else given["self"]
        aligned = bool(given.get("align_corners"))
        scales = given.get("scale_factors") or [given.get("scales_h"), given.get("scales_w")]
        size = _target(node, x, given["output_size"], scales, aligned)
        mixed = any(
            isinstance(new, int) and not isinstance(old, int)
            for old, new in zip(sizes(x)[-2:], size, strict=True)
        )
        if method.rounding == "floor" and mixed:
            raise refused(
                "interpolation to the nearest from an open size to a fixed one",
                node,
                'Use mode="nearest-exact" or "bilinear".',
            )
        if aligned and not all(isinstance(new, int) for new in size):
            raise refused(
                "interpolation with align_corners=True to an open size",
                node,
                "Use align_corners=False, or import with fixed sizes.",
            )
        # Of aligned corners a single pixel is the first one, as it is of two; for one, TVM divides
        # by zero.
        single = [axis for axis, new in enumerate(size, 2) if aligned and new == 1]
        result = relax.op.image.resize2d(
            x,
            tuple(2 if axis in single else new for axis, new in enumerate(size, 2)),
            layout="NCHW",
            method=method.method,
            coordinate_transformation_mode="align_corners" if aligned else method.coordinates,
            rounding_method=method.rounding,
            cubic_alpha=-0.75,
        )
        for axis in single:
            result = relax.op.strided_slice(importer.block_builder.emit(result), [axis], [0], [1])
        return importer.block_builder.emit(result)

    return converter


def _target(
    node: Node, x: relax.Expr, size: Sequence[Any] | None, scales: Sequence[Any], aligned: bool
) -> tuple[Any, ...]:
    """Return the height and width of the result.

    Relax takes the ratio of the sizes for the scale. PyTorch takes the scale that it was given,
    which is another one where the size was rounded down.
    """
    old = sizes(x)[-2:]
    new = list(size) if size is not None else list(map(_scaled, old, scales))
    if None in new or not (aligned or all(map(_is_exact, old, new, scales))):
        raise refused(
            f"interpolation by scale_factor={tuple(scales)} of a size {tuple(map(str, old))} does "
            "not give a whole number of pixels",
            node,
            "Give it a size, or recompute_scale_factor=True, or a whole scale_factor.",
        )
    return tuple(new)


def _scaled(size: Any, scale: float) -> Any:
    if isinstance(size, int):
        return math.floor(size * scale)
    return size * int(scale) if scale.is_integer() else None


def _is_exact(old: Any, new: Any, scale: float | None) -> bool:
    return scale is None or scale.is_integer() or (isinstance(old, int) and old * scale == new)


def _antialiased(node: Node, importer: Any) -> relax.Var:
    given = arguments(node, importer)
    x, new = given["input" if "input" in given else "self"], given["output_size"]
    grows = new is not None and all(
        isinstance(before, int) and isinstance(after, int) and after >= before
        for before, after in zip(sizes(x)[-2:], new, strict=True)
    )
    if not grows:
        raise refused(
            "interpolation with antialias=True is known only to a fixed larger size",
            node,
            "Leave antialias=True away where the size grows, or use avg_pool2d.",
        )
    return _resize(_METHODS["upsample_bilinear2d"])(node, importer)


RESIZES: Final[dict[str, Callable[[Node, Any], relax.Var]]] = {
    f"{name}.{overload}": converter
    for name, converter in (
        *((name, _resize(method)) for name, method in _METHODS.items()),
        ("_upsample_bilinear2d_aa", _antialiased),
    )
    for overload in ("default", "vec")
}
