"""Find layers: operators with constant weights, and what their kernels' epilogues can absorb.

A layer begins at a matmul, a convolution or a LayerNorm. It grows along the only reader of its
result through bias, LayerNorm (after a depthwise convolution), activation and residual sum, in this
order.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Final

import tvm
import tvm_ffi
from tvm import relax

from dcnv3_tvm.transform.ir import count_uses, dimensions, element_type, variables

_ACTIVATIONS: Final = {
    "relax.nn.gelu": "gelu",
    "relax.nn.relu": "relu",
    "relax.nn.silu": "silu",
    "relax.sigmoid": "sigmoid",
}


@dataclasses.dataclass(frozen=True)
class Layer:
    """An operator with weights and its epilogue, which become one kernel.

    Parameters
    ----------
    kind : str
        ``"matmul"``, ``"convolution"``, ``"depthwise"`` or ``"layer_norm"``.
    root : relax.Call
        The operator it begins with.
    bias : relax.Var or None
        One number for each output channel.
    norm : relax.Call or None
        LayerNorm over the channels of a depthwise convolution.
    activation : str or None
        One of `dcnv3_tvm.kernels.activations.ACTIVATIONS`.
    residual : relax.Expr or None
        Tensor of the result's shape, added last.
    """

    kind: str
    root: relax.Call
    bias: relax.Var | None = None
    norm: relax.Call | None = None
    activation: str | None = None
    residual: relax.Expr | None = None


def find_layers(function: relax.Function, inputs: int) -> dict[relax.Var, Layer]:
    """Find the layers of a function, by the variables that hold their results.

    Parameters
    ----------
    function : relax.Function
        Channels last, with weights folded. Its first `inputs` parameters are inputs, the others
        weights.
    inputs : int
        Number of inputs.
    """
    weights = set(function.params[inputs:])
    uses = count_uses(function)
    layers: dict[relax.Var, Layer] = {}
    for block in function.body.blocks:
        for binding in block.bindings:
            call = binding.value
            if not isinstance(call, relax.Call) or not isinstance(call.op, tvm.ir.Op):
                continue
            for source in call.args:
                previous = layers.get(source) if isinstance(source, relax.Var) else None
                if previous is None or uses[source] > 1:
                    continue
                grown = _grow(previous, source, call, weights)
                if grown is not None:
                    layers[binding.var] = grown
                    del layers[source]
                    break
            else:
                layer = _begin(call, weights)
                if layer is not None:
                    layers[binding.var] = layer
    return layers


def absorbed_values(function: relax.Function, layers: Mapping[relax.Var, Layer]) -> set[relax.Var]:
    """Find variables that need no storage: values inside a layer's kernel, and dead ones."""
    read = set(variables(function.body.body))
    absorbed = set()
    for block in reversed(function.body.blocks):
        for binding in reversed(block.bindings):
            layer = layers.get(binding.var)
            if binding.var not in read:
                absorbed.add(binding.var)
            elif layer is None:
                read.update(variables(binding.value))
            else:
                read.add(layer.root.args[0])
                if layer.residual is not None:
                    read.add(layer.residual)
    return absorbed


def _begin(call: relax.Call, weights: set[relax.Var]) -> Layer | None:
    name = call.op.name
    if name == "relax.nn.layer_norm":
        return Layer("layer_norm", call) if _is_channel_norm(call, weights) else None
    if name not in ("relax.matmul", "relax.nn.conv2d"):
        return None
    source, weight = call.args
    if weight not in weights or source in weights or element_type(source) != "float32":
        return None
    if name == "relax.matmul":
        return Layer("matmul", call) if weight.ty.ndim == 2 and source.ty.ndim > 1 else None
    return _begin_convolution(call)


def _begin_convolution(call: relax.Call) -> Layer | None:
    source, weight = call.args
    attrs = call.attrs
    if (str(attrs.data_layout), str(attrs.kernel_layout)) != ("NHWC", "OHWI"):
        return None
    if any(int(step) != 1 for step in attrs.dilation):
        return None
    top, left, bottom, right = (int(pad) for pad in attrs.padding)
    if (top, left) != (bottom, right):
        return None
    channels = dimensions(source)[-1]
    outputs, height, width, _ = dimensions(weight)
    if int(attrs.groups) == 1:
        pointwise = (height, width, top, left) == (1, 1, 0, 0)
        unit_stride = all(int(step) == 1 for step in attrs.strides)
        return Layer("matmul" if pointwise and unit_stride else "convolution", call)
    if int(attrs.groups) == channels == outputs:
        return Layer("depthwise", call)
    return None


def _grow(
    layer: Layer, source: relax.Var, call: relax.Call, weights: set[relax.Var]
) -> Layer | None:
    """Absorb a call that reads a layer's result `source`; None if the kernel cannot."""
    name = call.op.name
    if name == "relax.add":
        other = call.args[1] if call.args[0].same_as(source) else call.args[0]
        return _add(layer, source, other, weights)
    if layer.residual is not None or layer.activation is not None:
        return None
    if name in _ACTIVATIONS:
        return dataclasses.replace(layer, activation=_ACTIVATIONS[name])
    plain_depthwise = layer.kind == "depthwise" and layer.norm is None
    if name == "relax.nn.layer_norm" and plain_depthwise and _is_channel_norm(call, weights):
        return dataclasses.replace(layer, norm=call)
    return None


def _add(
    layer: Layer, source: relax.Var, other: relax.Expr, weights: set[relax.Var]
) -> Layer | None:
    if layer.residual is not None:
        return None
    if other in weights:
        plain = layer.bias is None and layer.norm is None and layer.activation is None
        if not plain or layer.kind == "layer_norm" or other.ty.ndim != 1:
            return None
        same = dimensions(other)[0] == dimensions(source)[-1]
        return dataclasses.replace(layer, bias=other) if same else None
    same_shape = tvm_ffi.structural_equal(source.ty, other.ty)
    if layer.kind in ("matmul", "layer_norm") and same_shape:
        return dataclasses.replace(layer, residual=other)
    return None


def _is_channel_norm(call: relax.Call, weights: set[relax.Var]) -> bool:
    """Whether a LayerNorm is over the channels alone, with constant scale and shift."""
    rank = call.args[0].ty.ndim
    over_channels = [int(axis) % rank for axis in call.attrs.axes] == [rank - 1]
    affine = bool(call.attrs.center) and bool(call.attrs.scale)
    constant = all(argument in weights for argument in call.args[1:])
    return over_channels and affine and constant and element_type(call.args[0]) == "float32"
