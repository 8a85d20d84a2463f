"""Which values of a model are kept in bfloat16, where products take their operands so.

What only matrix products read is stored in bfloat16 by the kernel that makes it. Everything else
stays in float32: the residual stream, whose many sums would lose digits; what DCNv3 samples, and
its offsets; and the convolutions between the stages, whose errors no residual sum dilutes. The
product that makes the offsets is one of bfloat16 unless ``offset_scale`` magnifies its errors.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, NamedTuple

import tvm
from tvm import relax

from dcnv3_tvm.kernels.packing import PAIR
from dcnv3_tvm.op import tensorir
from dcnv3_tvm.op.expr import KERNEL_ATTR
from dcnv3_tvm.transform.find_layers import Layer
from dcnv3_tvm.transform.ir import dimensions, variables

_OUTPUT_MULTIPLE: Final = 16
"""Sums in a vector register: with another number of output channels a product stays float32."""


def takes_bfloat16(layer: Layer) -> bool:
    """Whether a layer is a matrix product that can multiply bfloat16 operands in pairs."""
    if layer.kind != "matmul":
        return False
    source, weight = layer.root.args
    inputs = dimensions(source)[-1]
    outputs = dimensions(weight)[1 if weight.ty.ndim == 2 else 0]
    return bool(inputs % PAIR == 0 and outputs % _OUTPUT_MULTIPLE == 0)


def packed_sampling(call: relax.Expr, module: tvm.IRModule) -> tvm.tirx.PrimFunc | None:
    """Return the packed DCNv3 kernel that a call runs; None if it is another call."""
    if not isinstance(call, relax.Call) or getattr(call.op, "name", "") != "relax.call_tir":
        return None
    kernel = module[call.args[0]]
    packed = kernel.attrs.get(KERNEL_ATTR) == "dcnv3_packed"
    return kernel if packed else None


def _stores_bfloat16(layer: Layer | None, value: relax.Expr, module: tvm.IRModule) -> bool:
    if layer is None:
        return packed_sampling(value, module) is not None
    return layer.kind != "convolution"


class Values(NamedTuple):
    """Variables of a function, by what becomes of them.

    Parameters
    ----------
    inner : set of relax.Var
        Not stored: results that stay inside a layer's kernel, and dead ones.
    products : set of relax.Var
        Results of layers that take their operands in bfloat16.
    narrow : set of relax.Var
        Made by a kernel of ours that can store bfloat16, and read by products, and by nothing but
        products and depthwise convolutions.
    """

    inner: set[relax.Var]
    products: set[relax.Var]
    narrow: set[relax.Var]


def find_values(
    function: relax.Function, layers: Mapping[relax.Var, Layer], module: tvm.IRModule
) -> Values:
    """Tell what becomes of the values of a function.

    Parameters
    ----------
    function : relax.Function
        Channels last, with weights folded.
    layers : mapping of relax.Var to Layer
        What `find_layers` found in it.
    module : tvm.IRModule
        Holds the function and its kernels.
    """
    bindings = {
        binding.var: binding.value for block in function.body.blocks for binding in block.bindings
    }
    # Values that can be read in bfloat16, and whether a product is among the readers.
    readers: dict[relax.Var, bool] = {}
    wide = set(variables(function.body.body))
    magnified: set[relax.Expr] = set()
    inner, products = set(), set()
    # Readers come before what they read.
    for var, value in reversed(bindings.items()):
        layer = layers.get(var)
        if var not in readers and var not in wide:
            inner.add(var)
            continue
        if layer is None:
            wide.update(variables(value))
            sampling = packed_sampling(value, module)
            if sampling is not None and tensorir.spec_of(sampling).offset_scale > 1:
                magnified.add(value.args[1].fields[1])
            continue
        source = layer.root.args[0]
        product = takes_bfloat16(layer) and var not in magnified
        if product:
            products.add(var)
        if product or layer.kind == "depthwise":
            readers[source] = readers.get(source, False) or product
        else:
            wide.add(source)
        if layer.residual is not None:
            wide.add(layer.residual)
    narrow = {
        var
        for var, product in readers.items()
        if product
        and var not in wide
        and _stores_bfloat16(layers.get(var), bindings.get(var), module)
    }
    return Values(inner, products, narrow)
