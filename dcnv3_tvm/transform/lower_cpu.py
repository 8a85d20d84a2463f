"""The layers of the model become calls of our kernels, with their weights packed for them."""

from __future__ import annotations

from collections.abc import Callable

from tvm import relax

from dcnv3_tvm.kernels.convolution import convolution
from dcnv3_tvm.kernels.matmul import matmul
from dcnv3_tvm.kernels.packing import pack_convolution_weight, pack_matmul_weight
from dcnv3_tvm.op import tensorir
from dcnv3_tvm.transform.find_layers import Layer, find_layers
from dcnv3_tvm.transform.ir import Program, Rebuilder, element_type
from dcnv3_tvm.transform.layer_context import LayerContext, epilogue_of, pair_of
from dcnv3_tvm.transform.lower_normalization import lower_depthwise, lower_layer_norm
from dcnv3_tvm.transform.storage import Values, find_values, packed_sampling


def lower_layers(
    program: Program, tile_width: Callable[[int], int], dtype: str = "float32"
) -> Program:
    """Lower every layer that has a kernel of ours; the rest is left to TVM's legalisation.

    Parameters
    ----------
    program : Program
        Channels last, with weights folded.
    tile_width : callable
        Gives, for a number of output features, the width of the tiles to pack weights in.
    dtype : str
        Element type of the operands of products: float32, or bfloat16 for those that can.
    """
    found: dict[relax.Var, Layer] = {}
    per_entry: list[Values] = []
    for name, entry in program.entries.items():
        function = program.module[name]
        layers = find_layers(function, len(entry.inputs))
        found |= layers
        per_entry.append(find_values(function, layers, program.module))
    values = Values(*(set[relax.Var]().union(*kind) for kind in zip(*per_entry, strict=True)))
    if dtype == "float32":
        values = Values(values.inner, set(), set())
    lower: dict[str, Callable[[LayerContext], relax.Var]] = {
        "matmul": lambda context: _lower_matmul(context, tile_width),
        "convolution": lambda context: _lower_convolution(context, tile_width),
        "depthwise": lower_depthwise,
        "layer_norm": lower_layer_norm,
    }
    converted: dict[tuple[Rebuilder, relax.Expr], relax.Var] = {}

    def operand(rebuilder: Rebuilder, source: relax.Expr) -> relax.Var:
        """Return a tensor in bfloat16; one that is read several times is converted once."""
        if element_type(source) == "bfloat16":
            return source
        if (rebuilder, source) not in converted:
            converted[rebuilder, source] = rebuilder.emit(relax.op.astype(source, "bfloat16"))
        return converted[rebuilder, source]

    def visit(rebuilder: Rebuilder, var: relax.Var, call: relax.Call) -> relax.Var | None:
        if var in values.inner:
            return relax.Var(var.name, var.ty)  # a name that nothing refers to in the end
        layer = found.get(var)
        if layer is None:
            return _lower_sampling(rebuilder, var, call) if var in values.narrow else None
        source = rebuilder.current(layer.root.args[0])
        if var in values.products:
            source = operand(rebuilder, source)
        out_dtype = "bfloat16" if var in values.narrow else element_type(var)
        return lower[layer.kind](LayerContext(rebuilder, var, layer, source, out_dtype))

    return program.rebuilt(visit)


def _lower_sampling(rebuilder: Rebuilder, var: relax.Var, call: relax.Call) -> relax.Var | None:
    """Let the packed DCNv3 kernel store bfloat16."""
    kernel = packed_sampling(call, rebuilder.module)
    assert kernel is not None, "only kernels known to store bfloat16 are asked to"
    narrow = tensorir.packed_anew(kernel, out_dtype="bfloat16")
    function = rebuilder.add_kernel(narrow, tensorir.name_of(narrow))
    ty = relax.TensorType(var.ty.shape, "bfloat16")
    return rebuilder.emit(relax.call_tir(function, list(call.args[1].fields), ty), like=var)


def _lower_matmul(context: LayerContext, tile_width: Callable[[int], int]) -> relax.Var:
    layer, matrix = context.layer, context.matrix
    outputs, inputs = matrix.shape
    tile = tile_width(outputs)
    kernel = matmul(
        context.sizes(layer.root.args[0])[:-1],
        inputs,
        outputs,
        tile=tile,
        epilogue=epilogue_of(layer),
        dtype=context.dtype,
        out_dtype=context.out_dtype,
    )
    packed = context.packed(pack_matmul_weight(matrix.astype(context.dtype), tile))
    return context.call(
        kernel, f"matmul_{inputs}_{outputs}", [context.source, packed, layer.bias, layer.residual]
    )


def _lower_convolution(context: LayerContext, tile_width: Callable[[int], int]) -> relax.Var:
    layer, weight = context.layer, context.weight
    outputs, height, width, inputs = weight.shape
    tile = tile_width(outputs)
    batch, rows, columns, _ = context.sizes(layer.root.args[0])
    kernel = convolution(
        batch,
        rows,
        columns,
        inputs,
        outputs,
        kernel_size=(height, width),
        stride=pair_of(layer.root.attrs.strides),
        pad=pair_of(layer.root.attrs.padding),
        tile=tile,
        epilogue=epilogue_of(layer),
    )
    packed = context.packed(pack_convolution_weight(weight.transpose(0, 3, 1, 2), tile))
    return context.call(
        kernel, f"convolution_{inputs}_{outputs}", [context.source, packed, layer.bias]
    )
