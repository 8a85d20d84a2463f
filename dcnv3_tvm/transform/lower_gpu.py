"""Lower layers to kernels for GPUs, in the element type of the model."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from tvm import relax, tirx

from dcnv3_tvm.kernels.gemm import gemm, implicit_gemm, pack_gemm_weight
from dcnv3_tvm.kernels.mlp import mlp
from dcnv3_tvm.op.expr import int64, product, static
from dcnv3_tvm.op.relax_packed_op import is_dcnv3_packed
from dcnv3_tvm.transform.find_layers import Layer, absorbed_values, find_layers
from dcnv3_tvm.transform.gpu_padding import fuses_mlp, gemm_padding
from dcnv3_tvm.transform.ir import Program, Rebuilder, count_uses, dimensions, element_type
from dcnv3_tvm.transform.lazy_array import LazyArray
from dcnv3_tvm.transform.lower_common import (
    LayerContext,
    call_depthwise,
    depthwise_kernel,
    lower_layer_norm,
    lower_sampling,
)
from dcnv3_tvm.transform.storage_gpu import float32_values


def lower_gpu(
    program: Program,
    choose_run: Callable[[tirx.PrimFunc], int | None],
    dtype: str = "float32",
) -> Program:
    """Lower every layer that has a kernel; the rest is left to TVM's legalisation.

    Operators without a kernel of ours read float32: their inputs are converted.

    Parameters
    ----------
    program : Program
        Channels last, with weights folded.
    choose_run : callable
        From the schedules: the run length to build a depthwise kernel with, given the kernel
        without runs; None to keep that.
    dtype : str
        Element type of operands and stored values: float32, float16 or bfloat16.
    """
    layers: dict[relax.Var, Layer] = {}
    absorbed: set[relax.Var] = set()
    float32_stored: set[relax.Var] = set()
    mlps: dict[relax.Var, Layer] = {}
    for name, entry in program.entries.items():
        function = program.module[name]
        found = find_layers(function, len(entry.inputs))
        layers |= found
        absorbed |= absorbed_values(function, found)
        float32_stored |= float32_values(function, found, dtype)
        if dtype != "float32":
            hidden = _find_mlps(function, found)
            absorbed |= set(hidden.values())
            mlps |= {var: found[first] for var, first in hidden.items()}
    converted: dict[tuple[Rebuilder, relax.Expr], relax.Var] = {}

    def as_float32(rebuilder: Rebuilder, expr: relax.Expr) -> relax.Expr:
        """Convert an argument to float32, once for all its readers."""
        if isinstance(expr, relax.Tuple):
            return relax.Tuple([as_float32(rebuilder, field) for field in expr.fields])
        if not isinstance(expr.ty, relax.TensorType) or element_type(expr) != dtype:
            return expr
        if (rebuilder, expr) not in converted:
            converted[rebuilder, expr] = rebuilder.emit(relax.op.astype(expr, "float32"))
        return converted[rebuilder, expr]

    def visit(rebuilder: Rebuilder, var: relax.Var, call: relax.Call) -> relax.Var | None:
        if var in absorbed:
            return relax.Var(var.name, var.ty)  # placeholder: nothing reads it in the end
        stored = "float32" if var in float32_stored else dtype
        if is_dcnv3_packed(call):
            return lower_sampling(rebuilder, var, call, stored, vector_loads=True)
        layer = layers.get(var)
        if layer is None:
            if dtype == "float32":
                return None
            arguments = [as_float32(rebuilder, argument) for argument in call.args]
            return rebuilder.emit(
                relax.Call(call.op, arguments, call.attrs, call.ty_args), like=var
            )
        if var in mlps:
            return _lower_mlp(rebuilder, var, mlps[var], layer, dtype, stored)
        source = rebuilder.current(layer.root.args[0])
        context = LayerContext(rebuilder, var, layer, source, stored)
        if layer.kind == "matmul":
            return _lower_matmul(context, dtype)
        if layer.kind == "convolution":
            return _lower_convolution(context, dtype)
        if layer.kind == "depthwise":
            run = choose_run(depthwise_kernel(context))
            return call_depthwise(context, depthwise_kernel(context, run=run))
        return lower_layer_norm(context)

    return program.rebuilt(visit)


def _find_mlps(
    function: relax.Function, layers: Mapping[relax.Var, Layer]
) -> dict[relax.Var, relax.Var]:
    """Find pairs of matmuls to fuse: the result of the second, and that of the first."""
    uses = count_uses(function)
    found = {}
    for var, layer in layers.items():
        hidden = layer.root.args[0]
        first = layers.get(hidden) if isinstance(hidden, relax.Var) else None
        if first is not None and uses[hidden] == 1 and _is_mlp(first, layer, hidden, var):
            found[var] = hidden
    return found


def _is_mlp(first: Layer, second: Layer, hidden: relax.Var, result: relax.Var) -> bool:
    if any(layer.kind != "matmul" or layer.bias is None for layer in (first, second)):
        return False
    if first.activation is None or first.residual is not None or second.activation is not None:
        return False
    *lead, inputs = dimensions(first.root.args[0])
    features = inputs, dimensions(hidden)[-1], dimensions(result)[-1]
    return fuses_mlp(static(product(lead)), *features)


def _lower_mlp(
    rebuilder: Rebuilder, var: relax.Var, first: Layer, second: Layer, dtype: str, out_dtype: str
) -> relax.Var:
    source = rebuilder.current(first.root.args[0])
    inner = LayerContext(rebuilder, var, first, source, dtype)
    outer = LayerContext(rebuilder, var, second, source, out_dtype)
    hidden, inputs = inner.matrix.shape
    outputs, _ = outer.matrix.shape
    kernel = mlp(
        inner.sizes[:-1],
        inputs,
        hidden,
        outputs,
        padding=gemm_padding(inner.rows, inputs),
        activation=first.activation or "",
        residual=second.residual is not None,
        dtype=dtype,
        x_dtype=inner.dtype,
        residual_dtype=outer.residual_dtype,
        out_dtype=out_dtype,
    )
    weight1, weight2 = (
        _packed(context, context.matrix.astype(dtype), kernel.params[index])
        for context, index in ((inner, 1), (outer, 3))
    )
    arguments = [source, weight1, first.bias, weight2, second.bias, second.residual]
    return outer.call(kernel, f"mlp_{inputs}_{hidden}_{outputs}", arguments)


def _lower_matmul(context: LayerContext, dtype: str) -> relax.Var:
    layer, matrix = context.layer, context.matrix
    outputs, inputs = matrix.shape
    kernel = gemm(
        context.sizes[:-1],
        inputs,
        outputs,
        padding=gemm_padding(context.rows, inputs),
        epilogue=context.epilogue,
        dtype=dtype,
        x_dtype=context.dtype,
        residual_dtype=context.residual_dtype,
        out_dtype=context.out_dtype,
    )
    packed = _packed(context, matrix.astype(dtype), kernel.params[1])
    arguments = [context.source, packed, layer.bias, layer.residual]
    return context.call(kernel, f"matmul_{inputs}_{outputs}", arguments)


def _lower_convolution(context: LayerContext, dtype: str) -> relax.Var:
    weight = context.weight
    outputs, *kernel_size, inputs = weight.shape
    pixels = product([int64(size) for size in dimensions(context.var)[:-1]])
    padding = gemm_padding(pixels, math.prod(weight.shape[1:]))
    kernel = implicit_gemm(
        *context.sizes,
        outputs,
        kernel_size=tuple(kernel_size),
        **context.window,
        padding=padding,
        epilogue=context.epilogue,
        dtype=dtype,
        x_dtype=context.dtype,
        out_dtype=context.out_dtype,
    )
    packed = _packed(context, weight.astype(dtype), kernel.params[1])
    arguments = [context.source, packed, context.layer.bias]
    return context.call(kernel, f"convolution_{inputs}_{outputs}", arguments)


def _packed(context: LayerContext, weight: LazyArray, parameter: tirx.Buffer) -> relax.Var:
    padded = tuple(int(size) for size in parameter.shape)
    return context.packed(pack_gemm_weight, weight, parameter, padded=padded)
