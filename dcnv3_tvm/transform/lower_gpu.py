"""The layers of the model become calls of our kernels for GPUs.

Every result of a kernel of ours is stored in the type of the products, except

- results of the model, which are float32;
- the residual stream of stages with many sums, which would lose digits: it is float32;
- in bfloat16, what lies far within float16, unless a product reads it that multiplies in
  bfloat16: it is float16 (`half_products`);
- in bfloat16, of the rest every residual stream, and what makes sampling points, whose errors the
  image's gradients magnify: they are float32.

Operators that have no kernel of ours read float32: what they read is converted in their kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

import tvm
from tvm import relax

from dcnv3_tvm.kernels.gemm import gemm, implicit_gemm, pack_gemm_weight
from dcnv3_tvm.op import tensorir
from dcnv3_tvm.transform.find_layers import Layer, find_layers
from dcnv3_tvm.transform.half_products import PRODUCTS, half_products
from dcnv3_tvm.transform.ir import Program, Rebuilder, element_type, variables
from dcnv3_tvm.transform.layer_context import LayerContext, epilogue_of, pair_of
from dcnv3_tvm.transform.lower_mlp import find_mlps, lower_mlp
from dcnv3_tvm.transform.lower_normalization import lower_depthwise, lower_layer_norm
from dcnv3_tvm.transform.storage import find_values, packed_sampling

MANY_SUMS: Final = 16
"""Of two sums a block, those of the third stage of every released variant are more, and all others
fewer. In float16 they make up most of the errors of its maps and of those behind it: of
InternImage-T, 96x160 pixels, 2.1e-3 instead of 1.8e-3 in the last one. Float32 takes 9 % more time
for all the memory that a call of 64 images reads and writes."""


def lower_layers_gpu(program: Program, dtype: str = "float32") -> Program:
    """Lower every layer that has a kernel of ours; the rest is left to TVM's legalisation.

    Parameters
    ----------
    program : Program
        Channels last, with weights folded.
    dtype : str
        Element type of the operands of products: float32, float16 or bfloat16.
    """
    found: dict[relax.Var, Layer] = {}
    inner: set[relax.Var] = set()
    wide: set[relax.Var] = set()
    half: set[relax.Var] = set()
    values: set[relax.Var] = set()
    sensitive: set[relax.Var] = set()
    pairs: dict[relax.Var, relax.Var] = {}
    for name, entry in program.entries.items():
        function = program.module[name]
        layers = find_layers(function, len(entry.inputs))
        found |= layers
        wide |= _results(function)
        if dtype == "bfloat16":
            arrays = (program.weights[weight] for weight in entry.weights)
            weights = dict(zip(function.params[len(entry.inputs) :], arrays, strict=True))
            found_half = half_products(function, layers, len(entry.inputs), weights, program.module)
            half |= found_half.products
            values |= found_half.values
            sensitive |= _sensitive(function, layers, program.module)
        if dtype != "float32":
            wide |= _long_streams(layers)
            mlps = find_mlps(function, layers)
            # Both products of a kernel have factors of one type.
            pairs |= {var: first for var, first in mlps.items() if (var in half) == (first in half)}
        inner |= find_values(function, layers, program.module).inner | set(pairs.values())
    narrow = values - _read_by_others(found, half)
    wide |= sensitive - narrow
    converted: dict[tuple[Rebuilder, relax.Expr], relax.Var] = {}

    def stored(var: relax.Var) -> str:
        return "float32" if var in wide else "float16" if var in narrow else dtype

    def float32(rebuilder: Rebuilder, expr: relax.Expr) -> relax.Expr:
        """Return an argument in float32; one that is read several times is converted once."""
        if isinstance(expr, relax.Tuple):
            return relax.Tuple([float32(rebuilder, field) for field in expr.fields])
        if dtype == "float32" or not _is_half(expr):
            return expr
        if (rebuilder, expr) not in converted:
            converted[rebuilder, expr] = rebuilder.emit(relax.op.astype(expr, "float32"))
        return converted[rebuilder, expr]

    def visit(rebuilder: Rebuilder, var: relax.Var, call: relax.Call) -> relax.Var | None:
        if var in inner:
            return relax.Var(var.name, var.ty)  # a name that nothing refers to in the end
        if packed_sampling(call, rebuilder.module) is not None:
            return _lower_sampling(rebuilder, var, call, stored(var))
        layer = found.get(var)
        if layer is None:
            arguments = [float32(rebuilder, argument) for argument in call.args]
            return rebuilder.emit(
                relax.Call(call.op, arguments, call.attrs, call.ty_args), like=var
            )
        factors = "float16" if var in half else dtype
        if var in pairs:
            return lower_mlp(rebuilder, var, found[pairs[var]], layer, factors, stored(var))
        source = rebuilder.current(layer.root.args[0])
        context = LayerContext(rebuilder, var, layer, source, stored(var))
        return _LOWER[layer.kind](context, factors)

    return program.rebuilt(visit)


def _results(function: relax.Function) -> set[relax.Var]:
    """Find the variables that are a function's results, under any name."""
    found = set(variables(function.body.body))
    for block in reversed(function.body.blocks):
        for binding in reversed(block.bindings):
            if binding.var in found and not isinstance(binding.value, relax.Call):
                found.update(variables(binding.value))
    return found


def _is_half(expr: relax.Expr) -> bool:
    return isinstance(expr.ty, relax.TensorType) and element_type(expr) in ("float16", "bfloat16")


def _read_by_others(layers: Mapping[relax.Var, Layer], half: set[relax.Var]) -> set[relax.Var]:
    """Find the factors of products that do not multiply in float16."""
    return {
        layer.root.args[0]
        for var, layer in layers.items()
        if layer.kind in PRODUCTS and var not in half
    }


def _sensitive(
    function: relax.Function, layers: Mapping[relax.Var, Layer], module: tvm.IRModule
) -> set[relax.Var]:
    """Find the residual stream and the offsets, which bfloat16 has too few digits for."""
    found: set[relax.Var] = set()
    for block in function.body.blocks:
        for binding in block.bindings:
            layer = layers.get(binding.var)
            if layer is not None and layer.residual is not None:
                found.update((binding.var, layer.residual))
            elif packed_sampling(binding.value, module) is not None:
                found.add(binding.value.args[1].fields[1])
    return found


def _long_streams(layers: Mapping[relax.Var, Layer]) -> set[relax.Var]:
    """Find the residual streams of so many sums that float16 loses digits of them.

    Not where products read the sums themselves, with no norm between: they would have to convert
    them, and could not copy them into shared memory without a detour through registers.
    """
    streams: dict[relax.Var, list[relax.Var]] = {}
    for var, layer in layers.items():  # in the order in which they are computed
        if layer.residual is not None:
            stream = streams.pop(layer.residual, [layer.residual])
            streams[var] = [*stream, var]
    read = {layer.root.args[0] for layer in layers.values() if layer.kind != "layer_norm"}
    return {
        var
        for stream in streams.values()
        if len(stream) > MANY_SUMS and not read.intersection(stream[:-1])
        for var in stream
    }


def _lower_sampling(
    rebuilder: Rebuilder, var: relax.Var, call: relax.Call, out_dtype: str
) -> relax.Var:
    """Call the packed DCNv3 kernel for the element types that its arguments have."""
    x, offset_mask = call.args[1].fields
    kernel = tensorir.packed_anew(
        rebuilder.module[call.args[0]],
        x_dtype=element_type(x),
        offset_dtype=element_type(offset_mask),
        out_dtype=out_dtype,
    )
    function = rebuilder.add_kernel(kernel, tensorir.name_of(kernel))
    ty = relax.TensorType(var.ty.shape, out_dtype)
    return rebuilder.emit(relax.call_tir(function, [x, offset_mask], ty), like=var)


def _lower_matmul(context: LayerContext, dtype: str) -> relax.Var:
    layer, matrix = context.layer, context.matrix
    outputs, inputs = matrix.shape
    kernel = gemm(
        context.sizes(layer.root.args[0])[:-1],
        inputs,
        outputs,
        epilogue=epilogue_of(layer),
        dtype=dtype,
        x_dtype=context.dtype,
        residual_dtype=context.residual_dtype,
        out_dtype=context.out_dtype,
    )
    packed = context.packed(pack_gemm_weight(matrix.astype(dtype)))
    return context.call(
        kernel, f"matmul_{inputs}_{outputs}", [context.source, packed, layer.bias, layer.residual]
    )


def _lower_convolution(context: LayerContext, dtype: str) -> relax.Var:
    layer, weight = context.layer, context.weight
    outputs, height, width, inputs = weight.shape
    batch, rows, columns, _ = context.sizes(layer.root.args[0])
    kernel = implicit_gemm(
        batch,
        rows,
        columns,
        inputs,
        outputs,
        kernel_size=(height, width),
        stride=pair_of(layer.root.attrs.strides),
        pad=pair_of(layer.root.attrs.padding),
        epilogue=epilogue_of(layer),
        dtype=dtype,
        x_dtype=context.dtype,
        out_dtype=context.out_dtype,
    )
    packed = context.packed(pack_gemm_weight(weight.astype(dtype)))
    return context.call(
        kernel, f"convolution_{inputs}_{outputs}", [context.source, packed, layer.bias]
    )


_LOWER: Final[dict[str, Callable[[LayerContext, str], relax.Var]]] = {
    "matmul": _lower_matmul,
    "convolution": _lower_convolution,
    "depthwise": lambda context, _: lower_depthwise(context),
    "layer_norm": lambda context, _: lower_layer_norm(context),
}
