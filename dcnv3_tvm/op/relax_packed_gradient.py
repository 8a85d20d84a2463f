"""Gradients of DCNv3 with packed offsets and mask logits, composed of operators of Relax.

The packed tensor is sliced, the gradients of its parts are computed as for separate tensors, and
concatenated, with zeros for the padding.
"""

from __future__ import annotations

from collections.abc import Sequence

from tvm import relax

from dcnv3_tvm.op.relax_call import params_of, spec_of
from dcnv3_tvm.op.relax_gradient import emit_gradients
from dcnv3_tvm.op.relax_op import dcnv3


def packed_gradient(
    _result: relax.Var, call: relax.Call, grad: relax.Var, builder: relax.BlockBuilder
) -> list[relax.Expr]:
    """Return the gradients of x and of the packed tensor."""
    x, packed = call.args
    params = params_of(call)
    sizes = params.offset_channels, params.mask_channels
    slices = _slices(builder, packed, sizes)
    grad_x, *grads = emit_gradients(builder, grad, x, *slices, params=params)
    return [grad_x, _packed(grads, sizes, packed)]


def center_feature_gradient(
    _result: relax.Var, call: relax.Call, grad: relax.Var, builder: relax.BlockBuilder
) -> list[relax.Expr]:
    """Return the gradients of x and of the packed tensor, with a center feature.

    The result is ``y + s * (x - y)``, where y is DCNv3, computed again here, and s the sigmoid of
    one logit per group. Half types are converted to float32 for the arithmetic.
    """
    x, packed = call.args
    spec = spec_of(call)
    sizes = spec.offset_channels, spec.mask_channels, spec.group
    offset, logits, gate = _slices(builder, packed, sizes)
    y = builder.emit(dcnv3(x, offset, logits, **spec.params.keywords()))

    def cast(tensor: relax.Expr, dtype: str) -> relax.Expr:
        return tensor if spec.dtype == spec.accumulate_dtype else relax.op.astype(tensor, dtype)

    def by_group(tensor: relax.Expr) -> relax.Expr:
        grouped = [*x.ty.shape.values[:3], spec.group, spec.group_channels]
        return cast(relax.op.reshape(tensor, grouped), spec.accumulate_dtype)

    one = relax.const(1, spec.accumulate_dtype)
    s = builder.emit(relax.op.sigmoid(cast(gate, spec.accumulate_dtype)))
    total = builder.emit(by_group(grad))
    to_x = builder.emit(total * relax.op.expand_dims(s, 4))
    to_y = builder.emit(cast(relax.op.reshape(total - to_x, x.ty.shape), spec.dtype))
    to_s = relax.op.sum(total * (by_group(x) - by_group(y)), axis=4)
    to_gate = cast(to_s * s * (one - s), spec.dtype)

    grad_x, *grads = emit_gradients(builder, to_y, x, offset, logits, params=spec.params)
    direct = cast(relax.op.reshape(to_x, x.ty.shape), spec.dtype)
    return [relax.op.add(grad_x, direct), _packed([*grads, to_gate], sizes, packed)]


def _slices(
    builder: relax.BlockBuilder, packed: relax.Expr, sizes: Sequence[int]
) -> list[relax.Var]:
    """Emit slices of the packed tensor with these numbers of channels."""
    ends = [sum(sizes[: index + 1]) for index in range(len(sizes))]
    return [
        builder.emit(relax.op.strided_slice(packed, axes=[3], begin=[end - size], end=[end]))
        for end, size in zip(ends, sizes, strict=True)
    ]


def _packed(grads: Sequence[relax.Expr], sizes: Sequence[int], packed: relax.Expr) -> relax.Expr:
    """Concatenate gradients of slices, with zeros for the padding."""
    *leading, channels = packed.ty.shape.values
    padding = int(channels) - sum(sizes)
    zeros = relax.op.zeros([*leading, padding], packed.ty.dtype.dtype)
    return relax.op.concat([*grads, zeros] if padding else list(grads), axis=3)
