"""Lowering steps shared by CPU and GPU targets."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import tvm
from tvm import relax

from dcnv3_tvm.dtypes import numpy_dtype
from dcnv3_tvm.kernels.convolution import output_size
from dcnv3_tvm.kernels.depthwise import depthwise
from dcnv3_tvm.kernels.epilogue import Epilogue
from dcnv3_tvm.kernels.layer_norm import layer_norm
from dcnv3_tvm.op import relax_packed_op
from dcnv3_tvm.op.expr import int64, product
from dcnv3_tvm.transform.find_layers import Layer
from dcnv3_tvm.transform.ir import Rebuilder, dimensions, element_type
from dcnv3_tvm.transform.lazy_array import LazyArray


class LayerContext:
    """A layer being lowered to one kernel call: its input, weights and sizes.

    Parameters
    ----------
    rebuilder : Rebuilder
        Rebuilds the function that holds the layer.
    var : relax.Var
        The layer's result in the old function.
    layer : Layer
        The layer.
    source : relax.Expr
        The input in the new function.
    out_dtype : str
        Element type in which the result is stored.
    """

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

    @property
    def sizes(self) -> tuple[Any, ...]:
        """Shape of the input, with a new variable for each symbolic size."""
        return tuple(
            size
            if isinstance(size, int)
            else self._symbols.setdefault(
                str(size), tvm.tirx.Var(f"size{len(self._symbols)}", "int64")
            )
            for size in dimensions(self.layer.root.args[0])
        )

    @property
    def weight(self) -> LazyArray:
        """The layer's weight, not packed, in float32."""
        array = self.rebuilder.array(self.rebuilder.current(self.layer.root.args[1]))
        assert array is not None, "find_layers takes operators with a constant weight only"
        return array

    @property
    def matrix(self) -> LazyArray:
        """The weight of a matmul as (out_features, in_features)."""
        weight = self.weight
        # Stored as (in, out); that of a 1x1 convolution as (out, 1, 1, in).
        if weight.ndim == 2:
            return weight.transpose()
        return weight.reshape(weight.shape[0], weight.shape[-1])

    @property
    def residual_dtype(self) -> str | None:
        """Element type of the residual; None without one."""
        residual = self.layer.residual
        return None if residual is None else element_type(self.rebuilder.current(residual))

    @property
    def epilogue(self) -> Epilogue:
        """What follows the sums of a matmul or convolution."""
        return Epilogue(
            bias=self.layer.bias is not None,
            activation=self.layer.activation,
            residual=self.layer.residual is not None,
        )

    @property
    def window(self) -> dict[str, tuple[int, int]]:
        """Stride and padding of a convolution, as keyword arguments of its kernel."""
        attrs = self.layer.root.attrs
        return {"stride": _pair(attrs.strides), "pad": _pair(attrs.padding)}

    @property
    def rows(self) -> Any:
        """Number of vectors of features in the input."""
        return product([int64(size) for size in self.sizes[:-1]])

    def output_width(self, kernel_size: tuple[int, int]) -> Any:
        """Return the pixels in a row of a convolution's result."""
        height, width = (int64(size) for size in self.sizes[1:3])
        return output_size((height, width), kernel_size, **self.window)[1]

    def packed(
        self,
        function: Callable[..., np.ndarray],
        array: LazyArray,
        parameter: tvm.tirx.Buffer,
        **options: Any,
    ) -> relax.Var:
        """Add the weight in a kernel's layout.

        Parameters
        ----------
        function : callable
            Packs the array.
        array : LazyArray
            The weight, in an element type that the function takes.
        parameter : Buffer
            The kernel's parameter that it becomes.
        **options
            Keyword arguments of `function`.
        """
        shape = [int(size) for size in parameter.shape]
        dtype = numpy_dtype(str(parameter.dtype))
        packed = LazyArray(function, array, shape=shape, dtype=dtype, **options)
        return self.rebuilder.weight(
            packed, self.rebuilder.current(self.layer.root.args[1]), "packed"
        )

    def call(
        self, kernel: tvm.tirx.PrimFunc, name: str, arguments: list[relax.Expr | None]
    ) -> relax.Var:
        """Emit the call of a kernel, without the arguments that are None."""
        suffixes = [self.layer.activation, None if self.layer.residual is None else "residual"]
        name = "_".join([name, *(suffix for suffix in suffixes if suffix)])
        function = self.rebuilder.add_kernel(kernel, name)
        given = [self.rebuilder.current(argument) for argument in arguments if argument is not None]
        ty = relax.TensorType(self.var.ty.shape, self.out_dtype)
        return self.rebuilder.emit(relax.call_tir(function, given, ty), like=self.var)


def _pair(values: Any) -> tuple[int, int]:
    return int(values[0]), int(values[1])


def depthwise_kernel(
    context: LayerContext,
    *,
    run: int | None = None,
    row_slack: Callable[[Any], int] = lambda _: 0,
) -> tvm.tirx.PrimFunc:
    """Build the kernel of a depthwise convolution with its LayerNorm and activation.

    Parameters
    ----------
    context : LayerContext
        The layer.
    run : int, optional
        As in `dcnv3_tvm.kernels.depthwise.depthwise`.
    row_slack : callable
        Extra pixels to compute, for the pixels of an output row.
    """
    layer = context.layer
    kernel_size = context.weight.shape[1], context.weight.shape[2]
    return depthwise(
        *context.sizes,
        kernel_size=kernel_size,
        **context.window,
        bias=layer.bias is not None,
        norm_eps=None if layer.norm is None else float(layer.norm.attrs.epsilon),
        activation=layer.activation,
        x_dtype=context.dtype,
        out_dtype=context.out_dtype,
        run=run,
        row_slack=row_slack(context.output_width(kernel_size)),
    )


def call_depthwise(context: LayerContext, kernel: tvm.tirx.PrimFunc) -> relax.Var:
    """Emit the call of a depthwise kernel, whose weight is (kh, kw, C)."""
    layer = context.layer
    weight = context.weight.reshape(*context.weight.shape[:-1]).transpose(1, 2, 0)
    packed = context.packed(np.asarray, weight, kernel.params[1])
    norm = [] if layer.norm is None else list(layer.norm.args[1:])
    arguments = [context.source, packed, layer.bias, *norm]
    return context.call(kernel, f"depthwise_{context.sizes[-1]}", arguments)


def lower_layer_norm(
    context: LayerContext, row_slack: Callable[[Any], int] = lambda _: 0
) -> relax.Var:
    """Lower a LayerNorm with its activation and residual.

    Parameters
    ----------
    context : LayerContext
        The layer.
    row_slack : callable
        Extra rows to compute, for a number of rows.
    """
    layer = context.layer
    *lead, channels = context.sizes
    kernel = layer_norm(
        tuple(lead),
        channels,
        eps=float(layer.root.attrs.epsilon),
        activation=layer.activation,
        residual=layer.residual is not None,
        row_slack=row_slack(context.rows),
        x_dtype=context.dtype,
        residual_dtype=context.residual_dtype,
        out_dtype=context.out_dtype,
    )
    return context.call(kernel, f"layer_norm_{channels}", [*layer.root.args, layer.residual])


def lower_sampling(
    rebuilder: Rebuilder, var: relax.Var, call: relax.Call, out_dtype: str, *, vector_loads: bool
) -> relax.Var:
    """Lower a packed DCNv3 to its kernel for the element types of its arguments.

    Parameters
    ----------
    rebuilder : Rebuilder
        Rebuilds the function that holds the call.
    var : relax.Var
        The result in the old function.
    call : relax.Call
        Call of an operator of `dcnv3_tvm.op.relax_packed_op`, with arguments of the new function.
    out_dtype : str
        Element type in which the result is stored.
    vector_loads : bool
        Whether to use the variant of the kernel for GPUs.
    """
    kernel = relax_packed_op.kernel_of(call, out_dtype, vector_loads=vector_loads)
    function = rebuilder.add_kernel(kernel, relax_packed_op.kernel_name(call))
    ty = relax.TensorType(var.ty.shape, out_dtype)
    return rebuilder.emit(relax.call_tir(function, list(call.args), ty), like=var)
