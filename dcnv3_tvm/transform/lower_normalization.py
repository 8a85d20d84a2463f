"""Depthwise convolutions and LayerNorms become calls of our kernels, on every target alike."""

from __future__ import annotations

from tvm import relax

from dcnv3_tvm.kernels.depthwise import depthwise as depthwise_kernel
from dcnv3_tvm.kernels.layer_norm import layer_norm as layer_norm_kernel
from dcnv3_tvm.transform.layer_context import LayerContext, pair_of


def lower_depthwise(context: LayerContext) -> relax.Var:
    """Lower a depthwise convolution, with LayerNorm and activation behind it."""
    layer, weight = context.layer, context.weight
    batch, rows, columns, channels = context.sizes(layer.root.args[0])
    kernel = depthwise_kernel(
        batch,
        rows,
        columns,
        channels,
        kernel_size=weight.shape[1:3],
        stride=pair_of(layer.root.attrs.strides),
        pad=pair_of(layer.root.attrs.padding),
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


def lower_layer_norm(context: LayerContext) -> relax.Var:
    """Lower a LayerNorm, with activation and residual behind it."""
    layer = context.layer
    *lead, channels = context.sizes(layer.root.args[0])
    kernel = layer_norm_kernel(
        tuple(lead),
        channels,
        eps=float(layer.root.attrs.epsilon),
        activation=layer.activation,
        residual=layer.residual is not None,
        x_dtype=context.dtype,
        residual_dtype=context.residual_dtype,
        out_dtype=context.out_dtype,
    )
    return context.call(kernel, f"layer_norm_{channels}", [*layer.root.args, layer.residual])
