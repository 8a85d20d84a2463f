"""Pairs of products with an activation between them become calls of one kernel, on GPUs."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from tvm import relax

from dcnv3_tvm.kernels.gemm import pack_gemm_weight
from dcnv3_tvm.kernels.mlp import mlp, pays
from dcnv3_tvm.op.expr import product, static
from dcnv3_tvm.transform.find_layers import Layer
from dcnv3_tvm.transform.ir import Rebuilder, count_uses, dimensions
from dcnv3_tvm.transform.layer_context import LayerContext


def find_mlps(
    function: relax.Function, layers: Mapping[relax.Var, Layer]
) -> dict[relax.Var, relax.Var]:
    """Find the pairs that are worth one kernel: the first product by the second one's variable."""
    uses = count_uses(function)
    found = {}
    for var, layer in layers.items():
        hidden = layer.root.args[0]
        first = layers.get(hidden) if isinstance(hidden, relax.Var) else None
        if first is not None and uses[hidden] == 1 and _fits(first, layer, hidden, var):
            found[var] = hidden
    return found


def _fits(first: Layer, second: Layer, hidden: relax.Var, result: relax.Var) -> bool:
    if any(layer.kind != "matmul" or layer.bias is None for layer in (first, second)):
        return False
    if first.activation is None or first.residual is not None or second.activation is not None:
        return False
    *lead, inputs = dimensions(first.root.args[0])
    widths = inputs, dimensions(hidden)[-1], dimensions(result)[-1]
    return pays(static(product(lead)), *widths)


def lower_mlp(
    rebuilder: Rebuilder,
    var: relax.Var,
    first: Layer,
    second: Layer,
    dtype: str,
    out_dtype: str,
) -> relax.Var:
    """Call the kernel of both products, whose factors are of type `dtype`."""
    source = rebuilder.current(first.root.args[0])
    inner = LayerContext(rebuilder, var, first, source, dtype)
    outer = LayerContext(rebuilder, var, second, source, out_dtype)
    hidden, inputs = inner.matrix.shape
    outputs, _ = outer.matrix.shape
    kernel = mlp(
        inner.sizes(first.root.args[0])[:-1],
        inputs,
        hidden,
        outputs,
        activation=first.activation or "",
        residual=second.residual is not None,
        dtype=dtype,
        x_dtype=inner.dtype,
        residual_dtype=outer.residual_dtype,
        out_dtype=out_dtype,
    )
    weights = [
        context.packed(pack_gemm_weight(np.asarray(context.matrix, dtype)))
        for context in (inner, outer)
    ]
    arguments = [source, weights[0], first.bias, weights[1], second.bias, second.residual]
    return outer.call(kernel, f"mlp_{inputs}_{hidden}_{outputs}", arguments)
