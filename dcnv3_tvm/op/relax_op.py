"""DCNv3 as an operator of Relax, TVM's graph language.

Importing the module registers ``dcnv3_tvm.dcnv3`` once, with these attributes:

========================= =======================================================================
attribute                 effect
========================= =======================================================================
``FInferType``            checks the call and infers the type of the result, for static, symbolic
                          and unknown shapes
``FLegalize``             ``LegalizeOps`` lowers the call to ``call_tir`` of the TensorIR kernel, in
                          the variant for the current target
``FPrimalGradient``       ``Gradient`` differentiates graphs with the operators of
                          `dcnv3_tvm.op.relax_gradient`
``FPurity``               the call has no side effects: passes may move, merge or remove it
``FRelaxInferLayout``     ``ConvertLayout`` keeps the tensors NHWC
``TMixedPrecisionPolicy`` ``ToMixedPrecision`` casts the arguments to the half type; the arithmetic
                          inside stays float32
========================= =======================================================================

The name is ``dcnv3_tvm.dcnv3`` and not ``relax.dcnv3``, because TVM's parser of printed TVMScript
resolves an operator that TVM does not ship only under a prefix of its own. Print a module with
``script(show_meta=True)`` and parse it with `from_script`, which also handles symbolic shapes.
``tvm.ir.save_json`` and ``load_json`` work as they are.

Relay, where older documentation registers operators, is no longer part of TVM; Relax replaced it.

Examples
--------
>>> import tvm
>>> from tvm import relax, tirx
>>> from dcnv3_tvm.op import relax_op
>>> bb = relax.BlockBuilder()
>>> n = tirx.Var("n", "int64")
>>> shapes = {"x": (n, 7, 5, 32), "offset": (n, 7, 5, 36), "mask": (n, 7, 5, 18)}
>>> params = [relax.Var(name, relax.TensorType(shape)) for name, shape in shapes.items()]
>>> with bb.function("main", params):
...     result = bb.emit_func_output(bb.emit(relax_op.dcnv3(*params, group=2)))
>>> bb.get()["main"].ret_ty
R.Tensor((n, 7, 5, 32), dtype="float32")
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import tvm
from tvm import relax, s_tir

from dcnv3_tvm.op import tensorir
from dcnv3_tvm.op.relax_call import (
    add_kernel,
    current_target_is_gpu,
    is_call,
    make_call,
    params_of,
    register_operator,
    spec_of,
)
from dcnv3_tvm.op.relax_gradient import emit_gradients
from dcnv3_tvm.op.relax_types import ARGUMENTS, argument_types, result_type
from dcnv3_tvm.spec import DCNv3Keywords, DCNv3Params

if TYPE_CHECKING:
    from typing_extensions import Unpack

_PREFIX: Final = "dcnv3_tvm."
OP_NAME: Final = f"{_PREFIX}dcnv3"

_MIXED_PRECISION_ALWAYS: Final = 0
"""TVM's ``TMixedPrecisionPolicy`` that casts the arguments to the half type."""


def dcnv3(
    x: relax.Expr, offset: relax.Expr, mask: relax.Expr, **params: Unpack[DCNv3Keywords]
) -> relax.Call:
    """Build a call of the operator.

    Parameters
    ----------
    x, offset, mask : relax.Expr
        Tensors of shape (N, H, W, C), (N, Ho, Wo, group*P*2) and (N, Ho, Wo, group*P).
    **params
        As for `dcnv3_tvm.spec.DCNv3Params`.

    Returns
    -------
    relax.Call
        Not normalized: emit it with a ``relax.BlockBuilder``, which infers and checks types.

    Raises
    ------
    InvalidArgumentError
        If a parameter is out of range. Type inference checks shapes and dtypes.
    """
    return make_call(OP_NAME, [x, offset, mask], DCNv3Params(**params))


def is_dcnv3(expr: object) -> bool:
    """Return whether `expr` is a call of the operator."""
    return is_call(expr, OP_NAME)


def from_script(source: str) -> tvm.IRModule:
    """Parse a module printed by ``module.script(show_meta=True)``.

    The result types of this package's operators are inferred again. See tvm_workarounds:
    script-metadata.

    Raises
    ------
    InvalidArgumentError
        If a call of an operator in the text is invalid.
    """
    module = tvm.script.from_source(source, check_well_formed=False)
    for name, function in module.functions_items():
        if isinstance(function, relax.Function):
            module.update_func(name, _TypeInference(module).visit_expr(function))
    return module


@relax.expr_functor.mutator
class _TypeInference(relax.PyExprMutator):
    """Replace the type of every call of an operator of this package by the inferred one."""

    def visit_call_(self, call: relax.Call) -> relax.Expr:
        if not (isinstance(call.op, tvm.ir.Op) and call.op.name.startswith(_PREFIX)):
            return super().visit_call_(call)
        arguments = [self.visit_expr(argument) for argument in call.args]
        return self.builder_.normalize(relax.Call(call.op, arguments, attrs=call.attrs))


def _infer_type(call: relax.Call, _builder: relax.BlockBuilder) -> relax.TensorType:
    return result_type(call, argument_types(call, ARGUMENTS))


def _legalize(builder: relax.BlockBuilder, call: relax.Call) -> relax.Expr:
    kernel = tensorir.dcnv3(spec_of(call), vector_loads=current_target_is_gpu())
    return relax.call_tir(add_kernel(builder, kernel, "dcnv3"), list(call.args), call.ty)


def _gradient(
    _result: relax.Var, call: relax.Call, grad: relax.Var, builder: relax.BlockBuilder
) -> list[relax.Expr]:
    """Return the gradients of x, offset and mask."""
    return emit_gradients(builder, grad, *call.args, params=params_of(call))


def _infer_layout(call: relax.Call, _desired: Any, _layouts: Any) -> tvm.ir.base.Node:
    """Require the layouts as written, so that ConvertLayout transposes a converted tensor back."""
    written = tvm.ir.make_node(
        "relax.transform.LayoutDecision", layout=s_tir.slayout("ABCD"), is_unknown_dim=False
    )
    return tvm.ir.make_node(
        "relax.transform.InferLayoutOutput",
        input_layouts=[written] * len(ARGUMENTS),
        output_layouts=[written],
        new_attrs=call.attrs,
        new_args={},
    )


def _infer_mixed_precision(call: relax.Call, _out_dtype: Any) -> relax.Call:
    """Keep the call: the kernel accumulates in float32 and stores the dtype of its arguments."""
    return call


def _register() -> None:
    register_operator(
        OP_NAME,
        "Deformable convolution v3: sampling and weighted sum.",
        ARGUMENTS,
        {
            "FInferType": _infer_type,
            "FLegalize": _legalize,
            "FPrimalGradient": _gradient,
            "FPurity": True,
            "FRelaxInferLayout": _infer_layout,
            "TMixedPrecisionPolicy": _MIXED_PRECISION_ALWAYS,
            "FInferMixedPrecision": _infer_mixed_precision,
        },
    )


_register()
