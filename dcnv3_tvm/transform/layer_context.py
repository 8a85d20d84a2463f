"""A layer on its way to a kernel: what the functions that lower layers have in common."""

from __future__ import annotations

from typing import Any

import numpy as np
import tvm
from tvm import relax

from dcnv3_tvm.kernels.epilogue import Epilogue
from dcnv3_tvm.transform.find_layers import Layer
from dcnv3_tvm.transform.ir import Rebuilder, dimensions, element_type


class LayerContext:
    """A layer that is being lowered: its arguments, weights and sizes in the new function."""

    def __init__(
        self,
        rebuilder: Rebuilder,
        var: relax.Var,
        layer: Layer,
        source: relax.Expr,
        out_dtype: str,
    ) -> None:
        self.rebuilder = rebuilder
        self.var = var
        self.layer = layer
        self.source = source
        self.dtype = element_type(source)
        self.out_dtype = out_dtype
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

    @property
    def matrix(self) -> np.ndarray:
        """The weight of a product as (out, in)."""
        weight = self.weight
        # A product has its weight as (in, out), a 1x1 convolution as (out, 1, 1, in).
        return weight.T if weight.ndim == 2 else weight.reshape(weight.shape[0], weight.shape[-1])

    def packed(self, array: np.ndarray) -> relax.Var:
        """Add the weight in the order the kernel wants."""
        parent = self.rebuilder.current(self.layer.root.args[1])
        return self.rebuilder.weight(array, parent, "packed")

    @property
    def residual_dtype(self) -> str | None:
        """Element type of the residual; None where there is none."""
        residual = self.layer.residual
        return None if residual is None else element_type(self.rebuilder.current(residual))

    def call(
        self, kernel: tvm.tirx.PrimFunc, name: str, arguments: list[relax.Expr | None]
    ) -> relax.Var:
        """Emit the call of a kernel; arguments that are None are left out."""
        words = [name, self.layer.activation, None if self.layer.residual is None else "residual"]
        function = self.rebuilder.add_kernel(kernel, "_".join(word for word in words if word))
        given = [self.rebuilder.current(argument) for argument in arguments if argument is not None]
        ty = relax.TensorType(self.var.ty.shape, self.out_dtype)
        return self.rebuilder.emit(relax.call_tir(function, given, ty), like=self.var)


def epilogue_of(layer: Layer) -> Epilogue:
    """Return what follows the sums of a product or a convolution."""
    return Epilogue(
        bias=layer.bias is not None,
        activation=layer.activation,
        residual=layer.residual is not None,
    )


def pair_of(values: Any) -> tuple[int, int]:
    """Return a (height, width) pair of an attribute."""
    return int(values[0]), int(values[1])
