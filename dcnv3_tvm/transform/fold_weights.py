"""Fold constants, BatchNorm and per-channel scales into the weights.

BatchNorm becomes a scale and a shift. A per-channel scale after a matmul, a convolution or a
LayerNorm (a folded BatchNorm, a layer scale) is multiplied into its weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Final

import numpy as np
from tvm import relax

from dcnv3_tvm.transform.ir import Program, Rebuilder, static_shape, transpose_axes
from dcnv3_tvm.transform.lazy_array import LazyArray


def fold_weights(program: Program) -> Program:
    """Evaluate what depends on weights alone, and fold BatchNorm and per-channel scales."""
    return program.rebuilt(_fold)


def _fold(rebuilder: Rebuilder, var: relax.Var, call: relax.Call) -> relax.Expr | None:
    name = getattr(call.op, "name", "")
    if name == "relax.nn.batch_norm":
        return _fold_batch_norm(rebuilder, call)
    evaluated = _evaluate(rebuilder, var, call, name)
    if evaluated is not None:
        return evaluated
    if name == "relax.multiply":
        return _fold_scale(rebuilder, *call.args)
    if name == "relax.add":
        return _fold_shift(rebuilder, *call.args)
    return None


def _rsqrt(array: np.ndarray) -> np.ndarray:
    root: np.ndarray = 1 / np.sqrt(array)
    return root


_BINARY: Final[dict[str, Callable[..., Any]]] = {
    "relax.add": np.add,
    "relax.subtract": np.subtract,
    "relax.multiply": np.multiply,
    "relax.divide": np.divide,
}
_UNARY: Final[dict[str, Callable[..., Any]]] = {
    "relax.negative": np.negative,
    "relax.sqrt": np.sqrt,
    "relax.rsqrt": _rsqrt,
}
_VIEWS: Final = frozenset({"relax.reshape", "relax.expand_dims", "relax.squeeze", "relax.flatten"})


def _evaluate(
    rebuilder: Rebuilder, var: relax.Var, call: relax.Call, name: str
) -> relax.Var | None:
    """Compute the call if all its tensors are weights or literals."""
    elementwise = _BINARY.get(name) or _UNARY.get(name)
    if elementwise is None and name not in _VIEWS | {"relax.permute_dims", "relax.concat"}:
        return None
    tensors = call.args[0].fields if name == "relax.concat" else filter(_is_tensor, call.args)
    sources = list(tensors)
    arrays = _arrays(rebuilder, sources)
    shape = static_shape(var)
    if arrays is None or shape is None:
        return None
    if name == "relax.concat":
        result = LazyArray(_concatenate, *arrays, shape=shape, axis=int(call.attrs.axis))
    elif elementwise is not None:
        result = LazyArray(elementwise, *arrays, shape=shape)
    elif name == "relax.permute_dims":
        result = arrays[0].transpose(*transpose_axes(call))
    else:
        result = arrays[0].reshape(*shape)
    return rebuilder.weight(result, sources[0], name.removeprefix("relax."))


def _concatenate(*arrays: np.ndarray, axis: int) -> np.ndarray:
    return np.concatenate(arrays, axis)


def _arrays(rebuilder: Rebuilder, exprs: Iterable[relax.Expr]) -> list[LazyArray] | None:
    """Return the values of weights and literals; None if one is neither."""
    arrays = []
    for expr in exprs:
        array = rebuilder.array(expr)
        if array is None:
            return None
        arrays.append(array)
    return arrays


def _is_tensor(expr: relax.Expr) -> bool:
    return isinstance(expr.ty, relax.TensorType)


def _fold_batch_norm(rebuilder: Rebuilder, call: relax.Call) -> relax.Expr | None:
    source, *statistics = call.args
    arrays = _arrays(rebuilder, statistics)
    if arrays is None or bool(call.attrs.training):
        return None
    gamma, beta, mean, variance = (np.asarray(array, "float64") for array in arrays)
    scale = gamma / np.sqrt(variance + float(call.attrs.epsilon))
    rank, axis = source.ty.ndim, int(call.attrs.axis)
    shape = [1] * rank
    shape[axis] = -1
    if axis % rank == rank - 1:
        shape = [-1]
    dtype = arrays[0].dtype
    scale_var = rebuilder.weight(
        scale.reshape(shape).astype(dtype), statistics[0], "batch_norm_scale"
    )
    shift_var = rebuilder.weight(
        (beta - mean * scale).reshape(shape).astype(dtype), statistics[1], "batch_norm_shift"
    )
    scaled = _fold_scale(rebuilder, source, scale_var)
    if scaled is None:
        scaled = rebuilder.emit(relax.op.multiply(source, scale_var))
    result = _fold_shift(rebuilder, scaled, shift_var)
    if result is None:
        result = rebuilder.emit(relax.op.add(scaled, shift_var))
    return relax.Tuple([result, *statistics[2:]])


def _fold_scale(rebuilder: Rebuilder, first: relax.Expr, second: relax.Expr) -> relax.Var | None:
    for source, scale_var in ((first, second), (second, first)):
        scale = _by_channel(rebuilder, scale_var, source)
        if scale is not None:
            return _scaled(rebuilder, source, scale)
    return None


def _fold_shift(rebuilder: Rebuilder, first: relax.Expr, second: relax.Expr) -> relax.Var | None:
    """Rewrite a shift to ``add(value, bias of shape (channels,))``; merge consecutive ones."""
    for source, shift_var in ((first, second), (second, first)):
        shift = _by_channel(rebuilder, shift_var, source)
        if shift is None:
            continue
        inner = rebuilder.call(source, "relax.add", only_use=True)
        if inner is not None:
            earlier = _by_channel(rebuilder, inner.args[1], inner.args[0])
            if earlier is not None:
                source, shift = inner.args[0], earlier + shift
        known = rebuilder.array(second)
        if source is first and known is not None and known.ndim == 1:
            return None
        bias = rebuilder.weight(shift, shift_var, "bias")
        return rebuilder.emit(relax.op.add(source, bias))
    return None


def _by_channel(rebuilder: Rebuilder, weight: relax.Expr, source: relax.Expr) -> np.ndarray | None:
    """Return a weight as one number for each channel (last axis) of `source`, if it is that."""
    array = rebuilder.array(weight)
    if array is None or rebuilder.array(source) is not None:
        return None
    if source.ty.shape is None or source.ty.ndim == 0:
        return None
    channels = source.ty.shape[source.ty.ndim - 1]
    if array.size == 0 or array.shape[-1:] != (array.size,) or array.size != channels:
        return None
    return np.asarray(array).reshape(-1)


def _scaled(rebuilder: Rebuilder, source: relax.Expr, scale: np.ndarray) -> relax.Var | None:
    """Return ``source * scale`` with the scale folded into the weights of `source`, if any."""
    if (inner := rebuilder.call(source, "relax.add", only_use=True)) is not None:
        value, bias = inner.args
        shift = _by_channel(rebuilder, bias, value)
        scaled = None if shift is None else _scaled(rebuilder, value, scale)
        if scaled is None:
            return None
        return rebuilder.emit(relax.op.add(scaled, rebuilder.weight(shift * scale, bias, "scaled")))
    for name, axis in (("relax.matmul", -1), ("relax.nn.conv2d", 0)):
        inner = rebuilder.call(source, name, only_use=True)
        if inner is None:
            continue
        weight = rebuilder.array(inner.args[1])
        if weight is None:
            return None
        shape = [1] * weight.ndim
        shape[axis] = -1
        product = LazyArray(np.multiply, weight, scale.reshape(shape))
        scaled_weight = rebuilder.weight(product, inner.args[1], "scaled")
        return rebuilder.emit(relax.Call(inner.op, [inner.args[0], scaled_weight], inner.attrs))
    if (inner := rebuilder.call(source, "relax.nn.layer_norm", only_use=True)) is not None:
        parameters = [rebuilder.array(argument) for argument in inner.args[1:]]
        if any(array is None or array.shape != scale.shape for array in parameters):
            return None
        scaled_parameters = [
            rebuilder.weight(np.asarray(array) * scale, argument, "scaled")
            for array, argument in zip(parameters, inner.args[1:], strict=True)
        ]
        arguments = [inner.args[0], *scaled_parameters]
        return rebuilder.emit(relax.Call(inner.op, arguments, inner.attrs))
    return None
