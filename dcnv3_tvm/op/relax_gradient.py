"""The gradients of DCNv3, as two operators of Relax that `relax.transform.Gradient` emits.

==================================== =========================================
operator                             result
==================================== =========================================
``dcnv3_tvm.dcnv3_grad_x``           gradient of x
``dcnv3_tvm.dcnv3_grad_offset_mask`` gradients of offset and mask, as a tuple
==================================== =========================================

There are two, so that what is not needed, such as the gradient of an image, is not computed.
`dcnv3_tvm.op.relax_op` and `dcnv3_tvm.op.relax_packed_op` build their gradients of these operators.
They have no gradient themselves.
"""

from __future__ import annotations

from typing import Final, NoReturn

from tvm import relax

from dcnv3_tvm.errors import InvalidArgumentError
from dcnv3_tvm.op import tensorir
from dcnv3_tvm.op.relax_call import (
    add_kernel,
    current_target_is_gpu,
    dims_of,
    make_call,
    params_of,
    register_operator,
    spec_of,
)
from dcnv3_tvm.op.relax_types import ARGUMENTS, argument_types, check_shape, result_type
from dcnv3_tvm.spec import DCNv3Params

GRAD_X_OP_NAME: Final = "dcnv3_tvm.dcnv3_grad_x"
GRAD_OFFSET_MASK_OP_NAME: Final = "dcnv3_tvm.dcnv3_grad_offset_mask"

_ARGUMENTS: Final = {"grad": "gradient of the result (N, Ho, Wo, C)", **ARGUMENTS}
_X: Final = list(_ARGUMENTS).index("x")


def dcnv3_grad_x(
    grad: relax.Expr, x: relax.Expr, offset: relax.Expr, mask: relax.Expr, params: DCNv3Params
) -> relax.Call:
    """Build a call that computes the gradient of x, of which only shape and type matter.

    The gradient is added up in float32 at least, and then rounded to the type of x.
    """
    return make_call(GRAD_X_OP_NAME, [grad, x, offset, mask], params)


def dcnv3_grad_offset_mask(
    grad: relax.Expr, x: relax.Expr, offset: relax.Expr, mask: relax.Expr, params: DCNv3Params
) -> relax.Call:
    """Build a call that computes the gradients of offset and mask, as a tuple.

    With ``params.softmax``, that of mask is the gradient of the logits.
    """
    return make_call(GRAD_OFFSET_MASK_OP_NAME, [grad, x, offset, mask], params)


def emit_gradients(
    builder: relax.BlockBuilder,
    grad: relax.Expr,
    x: relax.Expr,
    offset: relax.Expr,
    mask: relax.Expr,
    *,
    params: DCNv3Params,
) -> list[relax.Expr]:
    """Return the gradients of x, offset and mask; emit what the last two share."""
    pair = builder.emit(dcnv3_grad_offset_mask(grad, x, offset, mask, params))
    grad_x = dcnv3_grad_x(grad, x, offset, mask, params)
    return [grad_x, relax.TupleGetItem(pair, 0), relax.TupleGetItem(pair, 1)]


def _check_types(call: relax.Call) -> dict[str, relax.TensorType]:
    """Check the arguments of a call; return their types by name."""
    types = argument_types(call, _ARGUMENTS)
    result = dims_of(result_type(call, types))
    if result is not None:
        check_shape("grad", types["grad"], result, params_of(call), _ARGUMENTS["grad"])
    return types


def _infer_grad_x(call: relax.Call, _builder: relax.BlockBuilder) -> relax.TensorType:
    return _check_types(call)["x"]


def _infer_grad_offset_mask(call: relax.Call, _builder: relax.BlockBuilder) -> relax.TupleType:
    types = _check_types(call)
    return relax.TupleType([types["offset"], types["mask"]])


def _legalize_grad_x(builder: relax.BlockBuilder, call: relax.Call) -> relax.Expr:
    spec = spec_of(call, x=_X)
    grad, x, offset, mask = call.args
    kernel = tensorir.dcnv3_grad_x(spec, vector_loads=current_target_is_gpu())
    sums_type = relax.TensorType(x.ty.shape, spec.accumulate_dtype, x.ty.vdevice)
    sums = relax.call_tir(
        add_kernel(builder, kernel, "dcnv3_grad_x"), [grad, offset, mask], sums_type
    )
    return sums if spec.dtype == spec.accumulate_dtype else relax.op.astype(sums, spec.dtype)


def _legalize_grad_offset_mask(builder: relax.BlockBuilder, call: relax.Call) -> relax.Expr:
    grad, x, offset, mask = call.args
    spec = spec_of(call, x=_X)
    kernel = tensorir.dcnv3_grad_offset_mask(spec, vector_loads=current_target_is_gpu())
    return relax.call_tir(
        add_kernel(builder, kernel, "dcnv3_grad_offset_mask"),
        [x, offset, mask, grad],
        list(call.ty.fields),
    )


def _no_second_derivative(_result: object, call: relax.Call, *_: object) -> NoReturn:
    raise InvalidArgumentError(
        "DCNv3 has no second derivatives",
        got=f"a function that calls {call.op.name}, to differentiate",
        allowed="functions that call dcnv3_tvm.dcnv3 or its packed forms",
        hint="Differentiate the function before relax.transform.Gradient was applied to it.",
    )


def _register() -> None:
    for name, results, infer_type, legalize in (
        (GRAD_X_OP_NAME, "x", _infer_grad_x, _legalize_grad_x),
        (
            GRAD_OFFSET_MASK_OP_NAME,
            "offset and mask",
            _infer_grad_offset_mask,
            _legalize_grad_offset_mask,
        ),
    ):
        register_operator(
            name,
            f"Gradient of deformable convolution v3 with respect to {results}.",
            _ARGUMENTS,
            {
                "FInferType": infer_type,
                "FLegalize": legalize,
                "FPrimalGradient": _no_second_derivative,
                "FPurity": True,
            },
        )


_register()
