"""The layers of the model become calls of our kernels, with their weights packed for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import numpy as np
import tvm
from tvm import relax

from dcnv3_tvm.op import normalization, products
from dcnv3_tvm.transform.find_layers import Layer, find_layers
from dcnv3_tvm.transform.program import Program, Rebuilder
from dcnv3_tvm.transform.shapes import dimensions


def lower_layers(program: Program, tile_width: Callable[[int], int]) -> Program:
    """Lower every layer that has a kernel of ours; the rest is left to TVM's legalisation.

    Parameters
    ----------
    program : Program
        Channels last, with weights folded.
    tile_width : callable
        Gives, for a number of output features, the width of the tiles to pack weights in.
    """
    found: dict[relax.Var, Layer] = {}
    for name, entry in program.entries.items():
        found |= find_layers(program.module[name], len(entry.inputs))

    def visit(rebuilder: Rebuilder, var: relax.Var, _call: relax.Call) -> relax.Var | None:
        layer = found.get(var)
        if layer is None:
            return None
        return _LOWER[layer.kind](_Context(rebuilder, var, layer, tile_width))

    return program.rebuilt(visit)


class _Context:
    """A layer that is being lowered: its arguments, weights and sizes in the new function."""

    def __init__(
        self,
        rebuilder: Rebuilder,
        var: relax.Var,
        layer: Layer,
        tile_width: Callable[[int], int],
    ) -> None:
        self.rebuilder = rebuilder
        self.var = var
        self.layer = layer
        self.tile_width = tile_width
        self.source = rebuilder.current(layer.root.args[0])
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
        """The weight of the operator the layer begins with."""
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
        return self.rebuilder.emit(relax.call_tir(function, given, self.var.ty), like=self.var)


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
    )
    packed = context.packed(products.pack_linear(matrix, tile))
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
