"""Channels last from the image to the outputs, with the transposes folded away."""

from __future__ import annotations

from tvm import relax

from dcnv3_tvm.transform.program import Program, Rebuilder
from dcnv3_tvm.transform.shapes import static_shape

# Operators that work on each element alone, so that a transpose may be moved behind them.
_ELEMENTWISE = frozenset(
    f"relax.{name}"
    for name in ("nn.gelu", "nn.gelu_tanh", "nn.relu", "nn.silu", "sigmoid", "tanh", "exp")
)


def convert_layout(program: Program) -> Program:
    """Turn the convolutions to NHWC, and remove the transposes that this leaves over."""
    layouts = {"relax.nn.conv2d": ["NHWC", "OHWI"]}
    program = program.transformed(relax.transform.ConvertLayout(layouts))
    return program.rebuilt(_fold_views)


def _fold_views(rebuilder: Rebuilder, var: relax.Var, call: relax.Call) -> relax.Var | None:
    name = getattr(call.op, "name", "")
    if name == "relax.permute_dims":
        return _fold_transpose(rebuilder, var, call)
    if name == "relax.reshape":
        return _fold_reshape(rebuilder, var, call)
    if name in _ELEMENTWISE:
        transpose = rebuilder.call(call.args[0], "relax.permute_dims", only_use=True)
        if transpose is not None:
            moved = rebuilder.emit(relax.Call(call.op, [transpose.args[0]], call.attrs))
            return rebuilder.emit(relax.op.permute_dims(moved, _axes(transpose)), like=var)
    return None


def _fold_transpose(rebuilder: Rebuilder, var: relax.Var, call: relax.Call) -> relax.Var | None:
    source, axes = call.args[0], _axes(call)
    inner = rebuilder.call(source, "relax.permute_dims")
    if inner is not None:
        source, inner_axes = inner.args[0], _axes(inner)
        axes = [inner_axes[axis] for axis in axes]
    if axes == sorted(axes):
        return source
    shape = static_shape(source)
    if shape is not None:
        moved = [axis for axis in axes if shape[axis] != 1]
        if moved == sorted(moved):
            # Only axes of size one change places: a view, no copy.
            view = relax.op.reshape(source, [shape[axis] for axis in axes])
            return rebuilder.emit(view, like=var)
    if inner is None:
        return None
    return rebuilder.emit(relax.op.permute_dims(source, axes), like=var)


def _fold_reshape(rebuilder: Rebuilder, var: relax.Var, call: relax.Call) -> relax.Var | None:
    source = call.args[0]
    inner = rebuilder.call(source, "relax.reshape")
    if inner is not None:
        source = inner.args[0]
    shape = static_shape(var)
    if shape is not None and shape == static_shape(source):
        return source
    if inner is None:
        return None
    return rebuilder.emit(relax.op.reshape(source, var.ty.shape), like=var)


def _axes(call: relax.Call) -> list[int]:
    rank = call.args[0].ty.ndim
    if call.attrs.axes is None:
        return list(reversed(range(rank)))
    return [int(axis) % rank for axis in call.attrs.axes]
