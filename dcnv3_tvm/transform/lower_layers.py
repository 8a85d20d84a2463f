"""The layers of the model become calls of our kernels, with their weights packed for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import numpy as np
import tvm
from tvm import relax

from dcnv3_tvm.op import normalization, products, tensorir
from dcnv3_tvm.transform.find_layers import Layer, find_layers
from dcnv3_tvm.transform.program import Program, Rebuilder
from dcnv3_tvm.transform.shapes import dimensions, element_type
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
        return _LOWER[layer.kind](_Context(rebuilder, var, layer, source, out_dtype, tile_width))

    return program.rebuilt(visit)


def _lower_sampling(rebuilder: Rebuilder, var: relax.Var, call: relax.Call) -> relax.Var | None:
    """Let the packed DCNv3 kernel store bfloat16."""
    kernel = packed_sampling(call, rebuilder.module)
    assert kernel is not None, "only kernels known to store bfloat16 are asked to"
    narrow = tensorir.dcnv3_packed(tensorir.spec_of(kernel), "bfloat16")
    function = rebuilder.add_kernel(narrow, "dcnv3_packed")
    ty = relax.TensorType(var.ty.shape, "bfloat16")
    return rebuilder.emit(relax.call_tir(function, list(call.args[1].fields), ty), like=var)


class _Context:
    """A layer that is being lowered: its arguments, weights and sizes in the new function."""

    def __init__(
        self,
        rebuilder: Rebuilder,
        var: relax.Var,
        layer: Layer,
        source: relax.Expr,
        out_dtype: str,
        tile_width: Callable[[int], int],
    ) -> None:
        self.rebuilder = rebuilder
        self.var = var
        self.layer = layer
        self.source = source
        self.dtype = element_type(source)
        self.out_dtype = out_dtype
        self.tile_width = tile_width
        self._symbols: dict[str, tvm.tirx.Var] = {}

    def sizes(self, expr: relax.Expr) -> tuple[Any, ...]:
        """Return the shape, with a variable of the kernel's own for each symbolic size."""
        return tuple(
            size
            if isinstance(size, int)
            else self._symbols.setdefault(
                str(size), tvm.tirx.Var(f"size{len(self._symbols)}", "int64")
            )
            for size in dimensions(expr)
        )

    @property
    def weight(self) -> np.ndarray:
        """The weight of the operator the layer begins with, not packed, in float32."""
        array = self.rebuilder.array(self.rebuilder.current(self.layer.root.args[1]))
        assert array is not None, "only operators with a known weight begin a layer"
        return array

    def packed(self, array: np.ndarray) -> relax.Var:
        """Add the weight in the order the kernel wants."""
        parent = self.rebuilder.current(self.layer.root.args[1])
        return self.rebuilder.weight(array, parent, "packed")

    def call(
        self, kernel: tvm.tirx.PrimFunc, name: str, arguments: list[relax.Expr | None]
    ) -> relax.Var:
        """Emit the call of a kernel; arguments that are None are left out."""
        words = [name, self.layer.activation, None if self.layer.residual is None else "residual"]
        function = self.rebuilder.add_kernel(kernel, "_".join(word for word in words if word))
        given = [self.rebuilder.current(argument) for argument in arguments if argument is not None]
        ty = relax.TensorType(self.var.ty.shape, self.out_dtype)
        return self.rebuilder.emit(relax.call_tir(function, given, ty), like=self.var)


def _epilogue(layer: Layer) -> products.Epilogue:
    return products.Epilogue(
        bias=layer.bias is not None,
        activation=layer.activation,
        residual=layer.residual is not None,
    )


def _lower_linear(context: _Context) -> relax.Var:
    layer, weight = context.layer, context.weight
    # A product has its weight as (in, out), a 1x1 convolution as (out, 1, 1, in).
    matrix = weight.T if weight.ndim == 2 else weight.reshape(weight.shape[0], weight.shape[-1])
    outputs, inputs = matrix.shape
    tile = context.tile_width(outputs)
    kernel = products.linear(
        context.sizes(layer.root.args[0])[:-1],
        inputs,
        outputs,
        tile=tile,
        epilogue=_epilogue(layer),
        dtype=context.dtype,
        out_dtype=context.out_dtype,
    )
    packed = context.packed(products.pack_linear(matrix.astype(context.dtype), tile))
    return context.call(
        kernel, f"linear_{inputs}_{outputs}", [context.source, packed, layer.bias, layer.residual]
    )


def _lower_convolution(context: _Context) -> relax.Var:
    layer, weight = context.layer, context.weight
    outputs, height, width, inputs = weight.shape
    tile = context.tile_width(outputs)
    batch, rows, columns, _ = context.sizes(layer.root.args[0])
    kernel = products.convolution(
        batch,
        rows,
        columns,
        inputs,
        outputs,
        kernel_size=(height, width),
        stride=_pair(layer.root.attrs.strides),
        pad=_pair(layer.root.attrs.padding),
        tile=tile,
        epilogue=_epilogue(layer),
    )
    packed = context.packed(products.pack_convolution(weight.transpose(0, 3, 1, 2), tile))
    return context.call(
        kernel, f"convolution_{inputs}_{outputs}", [context.source, packed, layer.bias]
    )


def _lower_depthwise(context: _Context) -> relax.Var:
    layer, weight = context.layer, context.weight
    batch, rows, columns, channels = context.sizes(layer.root.args[0])
    kernel = normalization.depthwise(
        batch,
        rows,
        columns,
        channels,
        kernel_size=weight.shape[1:3],
        stride=_pair(layer.root.attrs.strides),
        pad=_pair(layer.root.attrs.padding),
        bias=layer.bias is not None,
        norm_eps=None if layer.norm is None else float(layer.norm.attrs.epsilon),
        activation=layer.activation,
        x_dtype=context.dtype,
        out_dtype=context.out_dtype,
    )
    packed = context.packed(weight[..., 0].transpose(1, 2, 0))
    norm = [] if layer.norm is None else list(layer.norm.args[1:])
    return context.call(
        kernel, f"depthwise_{channels}", [context.source, packed, layer.bias, *norm]
    )


def _lower_layer_norm(context: _Context) -> relax.Var:
    layer = context.layer
    *lead, channels = context.sizes(layer.root.args[0])
    kernel = normalization.layer_norm(
        tuple(lead),
        channels,
        eps=float(layer.root.attrs.epsilon),
        activation=layer.activation,
        residual=layer.residual is not None,
        out_dtype=context.out_dtype,
    )
    return context.call(kernel, f"layer_norm_{channels}", [*layer.root.args, layer.residual])


def _pair(values: Any) -> tuple[int, int]:
    return int(values[0]), int(values[1])


_LOWER: Final[dict[str, Callable[[_Context], relax.Var]]] = {
    "linear": _lower_linear,
    "convolution": _lower_convolution,
    "depthwise": _lower_depthwise,
    "layer_norm": _lower_layer_norm,
}
