"""DCNv3 with offsets and mask logits in one tensor, as an operator of Relax between two passes.

`dcnv3_tvm.transform.fuse_sampling` puts it in place of ``dcnv3_tvm.dcnv3`` where one matmul can
compute offsets and logits. The lowering to kernels for CPUs or GPUs then chooses element types and
the variant of the kernel. ``LegalizeOps`` lowers what is left, in the types of the arguments.

The center feature has an operator of its own, so that both have the parameters of
`dcnv3_tvm.op.relax_op.dcnv3` as their attributes, which `params_of` and `spec_of` of
`dcnv3_tvm.op.relax_call` read.
"""

from __future__ import annotations

from typing import Final

from tvm import relax, tirx

from dcnv3_tvm.op import tensorir
from dcnv3_tvm.op.relax_call import (
    add_kernel,
    current_target_is_gpu,
    is_call,
    make_call,
    register_operator,
    spec_of,
)
from dcnv3_tvm.op.relax_packed_gradient import center_feature_gradient, packed_gradient
from dcnv3_tvm.spec import DCNv3Params

OP_NAME: Final = "dcnv3_tvm.dcnv3_packed"
CENTER_FEATURE_OP_NAME: Final = "dcnv3_tvm.dcnv3_packed_center_feature"

_ARGUMENTS: Final = {
    "x": "input (N, H, W, C)",
    "offset_mask": "offsets, mask logits and padding (N, Ho, Wo, channels)",
}


def dcnv3_packed(
    x: relax.Expr, offset_mask: relax.Expr, params: DCNv3Params, *, center_feature: bool = False
) -> relax.Call:
    """Build a call; arguments are as for `dcnv3_tvm.op.tensorir.dcnv3_packed`."""
    name = CENTER_FEATURE_OP_NAME if center_feature else OP_NAME
    return make_call(name, [x, offset_mask], params)


def is_dcnv3_packed(expr: object) -> bool:
    """Return whether `expr` is a call of one of the operators."""
    return is_call(expr, OP_NAME, CENTER_FEATURE_OP_NAME)


def kernel_name(call: relax.Call) -> str:
    """Return a name for the kernel of a call."""
    return str(call.op.name).removeprefix("dcnv3_tvm.")


def kernel_of(call: relax.Call, out_dtype: str, *, vector_loads: bool) -> tirx.PrimFunc:
    """Build the kernel of a call, for the element types that its arguments have.

    Parameters
    ----------
    call : relax.Call
        Call of one of the operators, normalized.
    out_dtype : str
        Element type of the result.
    vector_loads : bool
        As in `dcnv3_tvm.op.tensorir.dcnv3`.
    """
    return tensorir.dcnv3_packed(
        spec_of(call),
        offset_dtype=str(call.args[1].ty.dtype.dtype),
        out_dtype=out_dtype,
        center_feature=call.op.name == CENTER_FEATURE_OP_NAME,
        vector_loads=vector_loads,
    )


def _infer_type(call: relax.Call, _builder: relax.BlockBuilder) -> relax.TensorType:
    x, offset_mask = (argument.ty for argument in call.args)
    output = [*offset_mask.shape.values[:3], x.shape.values[3]]
    return relax.TensorType(output, x.dtype, x.vdevice)


def _legalize(builder: relax.BlockBuilder, call: relax.Call) -> relax.Expr:
    dtype = str(call.args[0].ty.dtype.dtype)
    kernel = kernel_of(call, dtype, vector_loads=current_target_is_gpu())
    return relax.call_tir(add_kernel(builder, kernel, kernel_name(call)), list(call.args), call.ty)


def _register() -> None:
    gradients = {OP_NAME: packed_gradient, CENTER_FEATURE_OP_NAME: center_feature_gradient}
    for name, gradient in gradients.items():
        register_operator(
            name,
            "Deformable convolution v3 with packed offsets and mask logits.",
            _ARGUMENTS,
            {
                "FInferType": _infer_type,
                "FLegalize": _legalize,
                "FPrimalGradient": gradient,
                "FPurity": True,
            },
        )


_register()
