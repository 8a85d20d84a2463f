"""Which values a model compiled in bfloat16 for a CPU stores in bfloat16.

A value that only matmuls read is stored in bfloat16 by the kernel that computes it. These stay in
float32:

- the residual stream, whose many sums would lose digits;
- what DCNv3 samples, and its offsets;
- the convolutions between the stages, whose errors no residual sum dilutes.

The matmul that computes the offsets runs in bfloat16 unless ``offset_scale`` magnifies its errors.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, NamedTuple

from tvm import relax

from dcnv3_tvm.kernels.packing import PAIR
from dcnv3_tvm.kernels.tile_matmul import supports_tiles
from dcnv3_tvm.op.relax_call import params_of
from dcnv3_tvm.op.relax_packed_op import is_dcnv3_packed
from dcnv3_tvm.transform.find_layers import Layer
from dcnv3_tvm.transform.ir import dimensions, variables

_OUTPUT_MULTIPLE: Final = 16
"""Sums in a vector register. A matmul with a partial vector of outputs stays in float32."""


class Bfloat16Values(NamedTuple):
    """Variables of a function that are in bfloat16.

    Parameters
    ----------
    matmuls : set of relax.Var
        Results of matmuls with bfloat16 operands.
    stored : set of relax.Var
        Values stored in bfloat16: matmuls read them, and nothing else but depthwise convolutions.
    """

    matmuls: set[relax.Var]
    stored: set[relax.Var]


def find_bfloat16(
    function: relax.Function, layers: Mapping[relax.Var, Layer], *, matrix_tiles: bool = False
) -> Bfloat16Values:
    """Find what is multiplied and stored in bfloat16.

    Parameters
    ----------
    function : relax.Function
        Channels last, with weights folded.
    layers : mapping of relax.Var to Layer
        Result of `find_layers`.
    matrix_tiles : bool
        Whether matmuls use matrix tiles instead of dot products of pairs.
    """
    bindings = {
        binding.var: binding.value for block in function.body.blocks for binding in block.bindings
    }
    # Values whose readers take bfloat16, and whether one of these is a matmul.
    readers: dict[relax.Var, bool] = {}
    float32 = set(variables(function.body.body))
    magnified: set[relax.Expr] = set()
    matmuls = set()
    # In reverse: readers before what they read.
    for var, value in reversed(bindings.items()):
        layer = layers.get(var)
        if var not in readers and var not in float32:
            continue
        if layer is None:
            float32.update(variables(value))
            if is_dcnv3_packed(value) and params_of(value).offset_scale > 1:
                magnified.add(value.args[1])
            continue
        source = layer.root.args[0]
        matmul = supports_bfloat16(layer, matrix_tiles=matrix_tiles) and var not in magnified
        if matmul:
            matmuls.add(var)
        if matmul or layer.kind == "depthwise":
            readers[source] = readers.get(source, False) or matmul
        else:
            float32.add(source)
        if layer.residual is not None:
            float32.add(layer.residual)
    stored = {
        var
        for var, matmul in readers.items()
        if matmul and var not in float32 and _stores_bfloat16(layers.get(var), bindings.get(var))
    }
    return Bfloat16Values(matmuls, stored)


def supports_bfloat16(layer: Layer, *, matrix_tiles: bool = False) -> bool:
    """Whether a layer is a matmul whose sizes suit matrix tiles, or dot products of pairs."""
    if layer.kind != "matmul":
        return False
    source, weight = layer.root.args
    inputs = dimensions(source)[-1]
    outputs = dimensions(weight)[1 if weight.ty.ndim == 2 else 0]
    if matrix_tiles:
        return supports_tiles(inputs, outputs)
    return bool(inputs % PAIR == 0 and outputs % _OUTPUT_MULTIPLE == 0)


def _stores_bfloat16(layer: Layer | None, value: relax.Expr) -> bool:
    """Whether the kernel that computes a value can store bfloat16."""
    if layer is None:
        return is_dcnv3_packed(value)
    return layer.kind != "convolution"
