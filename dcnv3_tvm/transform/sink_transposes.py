"""Cancel inverse transposes by sinking them through layout-agnostic operators.

Two consecutive transposes become one, or none. One that moves only axes of size one becomes a
reshape, which is a view.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final

import tvm_ffi
from tvm import relax

from dcnv3_tvm.transform.ir import Program, Rebuilder, dimensions, transpose_axes, with_attributes


def sink_transposes(program: Program) -> Program:
    """Move every transpose towards the outputs as far as it goes, and merge consecutive ones."""
    # Reshapes only at the end: until then the transposes of 1x1 maps must sink like all others.
    return program.rebuilt(_Sinker(views=False).visit).rebuilt(_Sinker(views=True).visit)


class _Sinker:
    """The rules of the operators; each emits a transpose of a value once.

    With `views`, transposes that move only axes of size one become reshapes.
    """

    def __init__(self, *, views: bool) -> None:
        self._views = views
        self._emitted: dict[tuple[relax.Expr, tuple[int, ...]], relax.Var] = {}

    def visit(self, rebuilder: Rebuilder, var: relax.Var, call: relax.Call) -> relax.Expr | None:
        rule = _RULES.get(getattr(call.op, "name", ""))
        return None if rule is None else rule(self, rebuilder, var, call)

    def permute_dims(self, rebuilder: Rebuilder, var: relax.Var, call: relax.Call) -> relax.Expr:
        return self._transposed(rebuilder, call.args[0], transpose_axes(call), like=var)

    def reshape(self, rebuilder: Rebuilder, var: relax.Var, call: relax.Call) -> relax.Expr | None:
        if var.ty.shape is None:
            return None
        shape = dimensions(var)
        source, axes = self._source(rebuilder, call)
        # (N, C, pixels...) to (N, C, tokens) or back: the same with the channels last.
        if (
            axes == _to_channels_second(len(axes or ()))
            and len(shape) > 2
            and _same_shape(shape[:2], [dimensions(call.args[0])[axis] for axis in (0, 1)])
        ):
            moved = self._reshaped(rebuilder, source, [shape[0], *shape[2:], shape[1]])
            return self._transposed(rebuilder, moved, _to_channels_second(len(shape)), like=var)
        return self._reshaped(rebuilder, call.args[0], shape, like=var)

    def elementwise(
        self, rebuilder: Rebuilder, var: relax.Var, call: relax.Call
    ) -> relax.Expr | None:
        axes = self._common_axes(rebuilder, call.args, var.ty.ndim)
        operands = None if axes is None else self._operands(rebuilder, call.args, axes)
        if axes is None or operands is None:
            return None
        moved = rebuilder.emit(with_attributes(call, operands))
        return self._transposed(rebuilder, moved, axes, like=var)

    def concat(self, rebuilder: Rebuilder, var: relax.Var, call: relax.Call) -> relax.Expr | None:
        if not isinstance(call.args[0], relax.Tuple):
            return None
        parts = call.args[0].fields
        axes = self._common_axes(rebuilder, parts, var.ty.ndim)
        operands = None if axes is None else self._operands(rebuilder, parts, axes)
        if axes is None or operands is None:
            return None
        axis = axes[int(call.attrs.axis) % len(axes)]
        moved = rebuilder.emit(with_attributes(call, [relax.Tuple(operands)], axis=axis))
        return self._transposed(rebuilder, moved, axes, like=var)

    def split(self, rebuilder: Rebuilder, var: relax.Var, call: relax.Call) -> relax.Expr | None:
        source, axes = self._source(rebuilder, call)
        if axes is None:
            return None
        axis = axes[int(call.attrs.axis) % len(axes)]
        moved = rebuilder.emit(with_attributes(call, [source], axis=axis))
        return relax.Tuple(
            [
                self._transposed(rebuilder, rebuilder.emit(relax.TupleGetItem(moved, i)), axes)
                for i in range(len(var.ty.fields))
            ]
        )

    def along_axis(
        self, rebuilder: Rebuilder, var: relax.Var, call: relax.Call
    ) -> relax.Expr | None:
        source, axes = self._source(rebuilder, call)
        if axes is None:
            return None
        axis = axes[int(call.attrs.axis) % len(axes)]
        moved = rebuilder.emit(with_attributes(call, [source, *call.args[1:]], axis=axis))
        return self._transposed(rebuilder, moved, axes, like=var)

    def batch_norm(self, rebuilder: Rebuilder, _: relax.Var, call: relax.Call) -> relax.Expr | None:
        source, axes = self._source(rebuilder, call)
        if axes is None:
            return None
        axis = axes[int(call.attrs.axis) % len(axes)]
        moved = rebuilder.emit(with_attributes(call, [source, *call.args[1:]], axis=axis))
        value, *statistics = (rebuilder.emit(relax.TupleGetItem(moved, i)) for i in range(3))
        return relax.Tuple([self._transposed(rebuilder, value, axes), *statistics])

    def group_norm(
        self, rebuilder: Rebuilder, var: relax.Var, call: relax.Call
    ) -> relax.Expr | None:
        source, axes = self._source(rebuilder, call)
        if axes is None:
            return None
        changed = {
            "channel_axis": axes[int(call.attrs.channel_axis) % len(axes)],
            "axes": sorted(axes[int(axis) % len(axes)] for axis in call.attrs.axes),
        }
        moved = rebuilder.emit(with_attributes(call, [source, *call.args[1:]], **changed))
        return self._transposed(rebuilder, moved, axes, like=var)

    def reduction(
        self, rebuilder: Rebuilder, var: relax.Var, call: relax.Call
    ) -> relax.Expr | None:
        source, axes = self._source(rebuilder, call)
        if axes is None:
            return None
        if call.attrs.axis is None:
            reduced, changed = list(axes), {}
        else:
            reduced = sorted(axes[int(axis) % len(axes)] for axis in call.attrs.axis)
            changed = {"axis": reduced}
        return self._reduced(rebuilder, var, call, source, axes, reduced, changed)

    def argument(self, rebuilder: Rebuilder, var: relax.Var, call: relax.Call) -> relax.Expr | None:
        source, axes = self._source(rebuilder, call)
        # Without an axis, the result is a position in the flattened tensor.
        if axes is None or call.attrs.axis is None:
            return None
        axis = axes[int(call.attrs.axis) % len(axes)]
        return self._reduced(rebuilder, var, call, source, axes, [axis], {"axis": axis})

    def _reduced(
        self,
        rebuilder: Rebuilder,
        var: relax.Var,
        call: relax.Call,
        source: relax.Expr,
        axes: list[int],
        reduced: list[int],
        changed: dict[str, Any],
    ) -> relax.Expr:
        moved = rebuilder.emit(with_attributes(call, [source], **changed))
        if not call.attrs.keepdims:
            kept = [axis for axis in axes if axis not in reduced]
            axes = [sorted(kept).index(axis) for axis in kept]
        return self._transposed(rebuilder, moved, axes, like=var)

    def pad(self, rebuilder: Rebuilder, var: relax.Var, call: relax.Call) -> relax.Expr | None:
        source, axes = self._source(rebuilder, call)
        if axes is None:
            return None
        width = [int(size) for size in call.attrs.pad_width]
        transposed = [
            size for axis in _inverse(axes) for size in (width[2 * axis], width[2 * axis + 1])
        ]
        moved = rebuilder.emit(with_attributes(call, [source], pad_width=transposed))
        return self._transposed(rebuilder, moved, axes, like=var)

    def image(self, rebuilder: Rebuilder, var: relax.Var, call: relax.Call) -> relax.Expr | None:
        source, axes = self._source(rebuilder, call)
        if axes != _to_channels_second(4) or str(call.attrs.layout) != "NCHW":
            return None
        changed = {"layout": "NHWC"}
        if hasattr(call.attrs, "out_layout"):
            changed["out_layout"] = "NHWC"
        moved = rebuilder.emit(with_attributes(call, [source, *call.args[1:]], **changed))
        return self._transposed(rebuilder, moved, axes, like=var)

    def _source(
        self, rebuilder: Rebuilder, call: relax.Call
    ) -> tuple[relax.Expr, list[int] | None]:
        """Return the source and the axes if the first argument is a transpose."""
        transpose = rebuilder.call(call.args[0], "relax.permute_dims")
        if transpose is None:
            return call.args[0], None
        return transpose.args[0], transpose_axes(transpose)

    def _common_axes(
        self, rebuilder: Rebuilder, operands: Iterable[relax.Expr], rank: int
    ) -> list[int] | None:
        """Return the axes of the first transpose of rank `rank` that is not of a weight."""
        for operand in operands:
            transpose = rebuilder.call(operand, "relax.permute_dims")
            if transpose is None or rebuilder.array(transpose.args[0]) is not None:
                continue
            axes = transpose_axes(transpose)
            if len(axes) == rank:
                return axes
        return None

    def _operands(
        self, rebuilder: Rebuilder, operands: Iterable[relax.Expr], axes: list[int]
    ) -> list[relax.Expr] | None:
        """Return the operands before the transpose; None if that would copy one."""
        operands = list(operands)
        if not all(self._is_free_to_transpose(rebuilder, operand, axes) for operand in operands):
            return None
        return [self._before_transpose(rebuilder, operand, axes) for operand in operands]

    def _is_free_to_transpose(
        self, rebuilder: Rebuilder, operand: relax.Expr, axes: list[int]
    ) -> bool:
        if not _has_axes(operand) or self._without_transpose(rebuilder, operand, axes) is not None:
            return True
        if operand.ty.shape is None:
            return False
        known = rebuilder.array(operand) is not None
        return known or _is_view(_broadcast_shape(operand, len(axes)), _inverse(axes))

    def _before_transpose(
        self, rebuilder: Rebuilder, operand: relax.Expr, axes: list[int]
    ) -> relax.Expr:
        if not _has_axes(operand):
            return operand
        inner = self._without_transpose(rebuilder, operand, axes)
        if inner is not None:
            return inner
        reshaped = self._reshaped(rebuilder, operand, _broadcast_shape(operand, len(axes)))
        return self._transposed(rebuilder, reshaped, _inverse(axes))

    def _without_transpose(
        self, rebuilder: Rebuilder, operand: relax.Expr, axes: list[int]
    ) -> relax.Expr | None:
        transpose = rebuilder.call(operand, "relax.permute_dims")
        if transpose is None or transpose_axes(transpose) != axes:
            return None
        return transpose.args[0]

    def _transposed(
        self,
        rebuilder: Rebuilder,
        source: relax.Expr,
        axes: Sequence[int],
        *,
        like: relax.Var | None = None,
    ) -> relax.Expr:
        inner = rebuilder.call(source, "relax.permute_dims")
        if inner is not None:
            inner_axes = transpose_axes(inner)
            source, axes = inner.args[0], [inner_axes[axis] for axis in axes]
        if list(axes) == sorted(axes):
            return source
        if self._views and source.ty.shape is not None:
            shape = dimensions(source)
            if _is_view(shape, axes):
                return self._reshaped(rebuilder, source, [shape[axis] for axis in axes], like=like)
        key = (source, tuple(axes))
        if key not in self._emitted:
            self._emitted[key] = rebuilder.emit(
                relax.op.permute_dims(source, list(axes)), like=like
            )
        return self._emitted[key]

    def _reshaped(
        self,
        rebuilder: Rebuilder,
        source: relax.Expr,
        shape: Sequence[Any],
        *,
        like: relax.Var | None = None,
    ) -> relax.Expr:
        inner = rebuilder.call(source, "relax.reshape")
        if inner is not None:
            source = inner.args[0]
        if source.ty.shape is not None and _same_shape(dimensions(source), shape):
            return source
        return rebuilder.emit(relax.op.reshape(source, relax.ShapeExpr(list(shape))), like=like)


def _to_channels_second(rank: int) -> list[int]:
    """Return the axes of the transpose from channels last to channels first."""
    return [0, rank - 1, *range(1, rank - 1)]


def _same_shape(shape: Sequence[Any], other: Sequence[Any]) -> bool:
    first, second = relax.ShapeExpr(list(shape)), relax.ShapeExpr(list(other))
    return bool(tvm_ffi.structural_equal(first, second))


def _inverse(axes: Sequence[int]) -> list[int]:
    return [list(axes).index(axis) for axis in range(len(axes))]


def _is_view(shape: Sequence[Any], axes: Sequence[int]) -> bool:
    """Whether a transpose moves axes of size one only, so that the memory stays the same."""
    moved = [axis for axis in axes if not (isinstance(shape[axis], int) and shape[axis] == 1)]
    return moved == sorted(moved)


def _has_axes(expr: relax.Expr) -> bool:
    """Whether an operand is a tensor of at least one axis, not a scalar or an attribute."""
    return isinstance(expr.ty, relax.TensorType) and expr.ty.ndim != 0


def _broadcast_shape(operand: relax.Expr, rank: int) -> list[Any]:
    """Return the shape of an operand with the leading axes that broadcasting adds."""
    return [1] * (rank - operand.ty.ndim) + list(dimensions(operand))


_Rule = Callable[[_Sinker, Rebuilder, relax.Var, relax.Call], relax.Expr | None]

_ELEMENTWISE: Final = (
    *("abs", "acos", "acosh", "asin", "asinh", "atan", "atanh", "bitwise_not", "ceil", "cos"),
    *("cosh", "erf", "exp", "floor", "isfinite", "isinf", "isnan", "log", "logical_not"),
    *("negative", "round", "rsqrt", "sigmoid", "sign", "sin", "sinh", "sqrt", "square", "tan"),
    *("tanh", "trunc", "astype", "clip", "full_like", "ones_like", "zeros_like", "where"),
    *("nn.gelu", "nn.gelu_tanh", "nn.leakyrelu", "nn.relu", "nn.relu6", "nn.selu", "nn.silu"),
    *("nn.softplus", "add", "atan2", "bitwise_and", "bitwise_or", "bitwise_xor", "divide"),
    *("equal", "floor_divide", "floor_mod", "greater", "greater_equal", "less", "less_equal"),
    *("log_add_exp", "logical_and", "logical_or", "logical_xor", "maximum", "minimum", "mod"),
    *("multiply", "not_equal", "power", "subtract"),
)
_REDUCTIONS: Final = ("max", "mean", "min", "prod", "std", "sum", "variance")
_IMAGES: Final = ("nn.adaptive_avg_pool2d", "nn.avg_pool2d", "nn.max_pool2d", "image.resize2d")

_RULES: Final[dict[str, _Rule]] = {
    f"relax.{name}": rule
    for names, rule in (
        (("permute_dims",), _Sinker.permute_dims),
        (("reshape",), _Sinker.reshape),
        (_ELEMENTWISE, _Sinker.elementwise),
        (("concat",), _Sinker.concat),
        (("split",), _Sinker.split),
        (("nn.log_softmax", "nn.prelu", "nn.softmax"), _Sinker.along_axis),
        (("nn.batch_norm",), _Sinker.batch_norm),
        (("nn.group_norm", "nn.instance_norm"), _Sinker.group_norm),
        (_REDUCTIONS, _Sinker.reduction),
        (("argmax", "argmin"), _Sinker.argument),
        (("nn.pad",), _Sinker.pad),
        (_IMAGES, _Sinker.image),
    )
    for name in names
}
