"""DCNv3 as an operator of Relax, TVM's graph language.

Importing the module registers ``dcnv3_tvm.dcnv3`` once, with these attributes:

========================= =======================================================================
attribute                 effect
========================= =======================================================================
``FInferType``            checks the call and infers the type of the result, for static, symbolic
                          and unknown shapes
``FLegalize``             ``LegalizeOps`` lowers the call to ``call_tir`` of the TensorIR kernel, in
                          the variant for the current target
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

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

import tvm
import tvm_ffi
from tvm import relax, s_tir, tirx
from tvm.target import Target

from dcnv3_tvm.dtypes import DTYPE_BYTES
from dcnv3_tvm.errors import InvalidArgumentError
from dcnv3_tvm.op import tensorir
from dcnv3_tvm.spec import PARAMETERS, DCNv3Keywords, DCNv3Params, DCNv3Spec
from dcnv3_tvm.targets import is_gpu

if TYPE_CHECKING:
    from typing_extensions import Unpack

OP_NAME: Final = "dcnv3_tvm.dcnv3"

_ARGUMENTS: Final = {
    "x": "input (N, H, W, C)",
    "offset": "sampling offsets (N, Ho, Wo, G*P*2), x before y, in pixels",
    "mask": "modulation (N, Ho, Wo, G*P): weights, or logits with softmax=True",
}
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
    attributes = dataclasses.asdict(DCNv3Params(**params))
    return relax.Call(
        tvm.ir.Op.get(OP_NAME),
        [x, offset, mask],
        attrs=tvm.ir.make_node("ir.DictAttrs", **attributes),
    )


def is_dcnv3(expr: object) -> bool:
    """Return whether `expr` is a call of the operator."""
    return (
        isinstance(expr, relax.Call) and isinstance(expr.op, tvm.ir.Op) and expr.op.name == OP_NAME
    )


def params_of(call: relax.Call) -> DCNv3Params:
    """Read the parameters of a call from its attributes.

    Raises
    ------
    InvalidArgumentError
        If attributes are missing, unknown or invalid, as in a call that `dcnv3` did not build.
    """
    attributes = {} if call.attrs is None else dict(call.attrs.items())
    if set(attributes) != set(PARAMETERS):
        raise InvalidArgumentError(
            f"the attributes of {OP_NAME} are not complete",
            got=", ".join(sorted(attributes)) or "none",
            allowed=", ".join(PARAMETERS),
            hint="Build the call with dcnv3_tvm.op.relax_op.dcnv3(...).",
        )
    return DCNv3Params(**{name: _plain(value) for name, value in attributes.items()})


def spec_of(call: relax.Call) -> DCNv3Spec:
    """Return the specification of a call; sizes that are not constants become None.

    Raises
    ------
    InvalidArgumentError
        If the channels or the dtype of x are unknown.
    """
    x_type = call.args[0].ty
    dims = _dims(x_type)
    dtype = _dtype(x_type)
    sizes = None if dims is None else [_constant(dim) for dim in dims]
    if sizes is None or sizes[3] is None or dtype is None:
        raise InvalidArgumentError(
            "the channels or the dtype of x are unknown",
            got=f"x: {x_type}",
            allowed="a tensor (N, H, W, C) with a constant C; N, H and W may be symbolic",
        )
    return DCNv3Spec.of(tuple(sizes), dtype=dtype, **params_of(call).keywords())


def from_script(source: str) -> tvm.IRModule:
    """Parse a module printed by ``module.script(show_meta=True)``.

    The result types of the operator are inferred again. See tvm_workarounds: script-metadata.

    Raises
    ------
    InvalidArgumentError
        If a call of the operator in the text is invalid.
    """
    module = tvm.script.from_source(source, check_well_formed=False)
    for name, function in module.functions_items():
        if isinstance(function, relax.Function):
            module.update_func(name, _TypeInference(module).visit_expr(function))
    return module


@relax.expr_functor.mutator
class _TypeInference(relax.PyExprMutator):
    """Replace the type of every call of the operator by the inferred one."""

    def visit_call_(self, call: relax.Call) -> relax.Expr:
        if not is_dcnv3(call):
            return super().visit_call_(call)
        arguments = [self.visit_expr(argument) for argument in call.args]
        return self.builder_.normalize(relax.Call(call.op, arguments, attrs=call.attrs))


def _plain(value: Any) -> Any:
    """Convert TVM's constants and arrays to Python values."""
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(item) for item in value]
    return value.value if isinstance(value, (tirx.IntImm, tirx.FloatImm)) else value


def _constant(dim: Any) -> int | None:
    if isinstance(dim, int):
        return dim
    return int(dim.value) if isinstance(dim, tirx.IntImm) else None


def _dims(tensor: relax.TensorType) -> list[Any] | None:
    return list(tensor.shape.values) if isinstance(tensor.shape, relax.ShapeExpr) else None


def _dtype(tensor: relax.TensorType) -> str | None:
    return None if tensor.dtype is None else str(tensor.dtype.dtype)


def _infer_type(call: relax.Call, _builder: relax.BlockBuilder) -> relax.TensorType:
    if len(call.args) != len(_ARGUMENTS):
        raise InvalidArgumentError(
            f"{OP_NAME} has the wrong number of arguments",
            got=len(call.args),
            allowed=f"{len(_ARGUMENTS)}: {', '.join(_ARGUMENTS)}",
        )
    params = params_of(call)
    for name, argument in zip(_ARGUMENTS, call.args, strict=True):
        if not isinstance(argument.ty, relax.TensorType):
            raise InvalidArgumentError(f"{name} is not a tensor", got=str(argument.ty))
        if argument.ty.ndim not in (-1, 4):
            raise InvalidArgumentError(
                f"{name} does not have four dimensions",
                got=str(argument.ty),
                allowed=_ARGUMENTS[name],
            )
    x, offset, mask = (argument.ty for argument in call.args)
    _check_dtypes(x, offset, mask)

    dims = _dims(x)
    sizes: list[int | None] = [None] * 4 if dims is None else [_constant(dim) for dim in dims]
    if sizes[3] is None:
        # No check of a parameter or of another tensor depends on the channels in a group.
        sizes[3] = params.group
    DCNv3Spec.of(sizes, **params.keywords())
    expected = None if dims is None else _output_dims(dims, params)
    _check_shape("offset", offset, expected, params.offset_channels, params)
    _check_shape("mask", mask, expected, params.mask_channels, params)
    if dims is None or expected is None:
        return relax.TensorType(dtype=x.dtype, vdevice=x.vdevice, ndim=4)
    return relax.TensorType([*expected, dims[3]], x.dtype, x.vdevice)


def _check_dtypes(x: relax.TensorType, offset: relax.TensorType, mask: relax.TensorType) -> None:
    dtypes = {"x": _dtype(x), "offset": _dtype(offset), "mask": _dtype(mask)}
    got = ", ".join(f"{name}: {dtype}" for name, dtype in dtypes.items())
    given = {dtype for dtype in dtypes.values() if dtype is not None}
    if len(given) > 1:
        raise InvalidArgumentError("x, offset and mask differ in dtype", got=got)
    if given and given.isdisjoint(DTYPE_BYTES):
        raise InvalidArgumentError(
            "the dtype is not supported", got=got, allowed=", ".join(DTYPE_BYTES)
        )


def _output_dims(dims: list[Any], params: DCNv3Params) -> list[Any]:
    """Return N, Ho and Wo as expressions of the dimensions of x."""
    analyzer = tvm.sym.Analyzer()
    extents = (params.output_extent(dim, axis) for axis, dim in enumerate(dims[1:3]))
    return [dims[0], *(analyzer.simplify(extent) for extent in extents)]


def _check_shape(
    name: str,
    tensor: relax.TensorType,
    expected: list[Any] | None,
    channels: int,
    params: DCNv3Params,
) -> None:
    """Reject a shape that is provably wrong; dynamic sizes are checked at run time."""
    dims = _dims(tensor)
    if dims is None:
        return
    pairs = [(dims[3], channels)]
    if expected is not None:
        pairs += list(zip(dims[:3], expected, strict=True))
    analyzer = tvm.sym.Analyzer()
    for got, allowed in pairs:
        difference = analyzer.simplify(got - allowed)
        if isinstance(difference, tirx.IntImm) and difference.value != 0:
            leading = ("N", "Ho", "Wo") if expected is None else expected
            raise InvalidArgumentError(
                f"{name} does not match x and the attributes",
                got=f"shape {_shown(dims)}",
                allowed=f"shape {_shown([*leading, channels])}",
                hint=f"{_ARGUMENTS[name]}, with {params.group} groups of {params.points} points, "
                f"kernel_size={params.kernel_size}, stride={params.stride}, pad={params.pad}, "
                f"dilation={params.dilation}.",
            )


def _shown(dims: Sequence[Any]) -> str:
    return f"({', '.join(str(_plain(dim)) for dim in dims)})"


def current_target_is_gpu() -> bool:
    """Return whether the target that TVM lowers for, if any, is a GPU."""
    target = Target.current(allow_none=True)
    return target is not None and is_gpu(target)


def _legalize(builder: relax.BlockBuilder, call: relax.Call) -> relax.Expr:
    kernel = tensorir.dcnv3(spec_of(call), vector_loads=current_target_is_gpu())
    return relax.call_tir(builder.add_func(kernel, "dcnv3"), list(call.args), call.ty)


def _infer_layout(call: relax.Call, _desired: Any, _layouts: Any) -> tvm.ir.base.Node:
    """Require the layouts as written, so that ConvertLayout transposes a converted tensor back."""
    written = tvm.ir.make_node(
        "relax.transform.LayoutDecision", layout=s_tir.slayout("ABCD"), is_unknown_dim=False
    )
    return tvm.ir.make_node(
        "relax.transform.InferLayoutOutput",
        input_layouts=[written] * len(_ARGUMENTS),
        output_layouts=[written],
        new_attrs=call.attrs,
        new_args={},
    )


def _infer_mixed_precision(call: relax.Call, _out_dtype: Any) -> relax.Call:
    """Keep the call: the kernel accumulates in float32 and stores the dtype of its arguments."""
    return call


class _CarriedError(InvalidArgumentError):
    """An `InvalidArgumentError` that passed through C++. See tvm_workarounds: ffi-errors."""

    def __init__(self, message: str) -> None:
        super().__init__(message.removesuffix("."))


def register_operator(
    name: str, description: str, arguments: Mapping[str, str], attributes: Mapping[str, Any]
) -> None:
    """Register a Relax operator with TVM, unless the process already has it.

    Parameters
    ----------
    name, description : str
        Name of the operator, and a sentence about it.
    arguments : mapping of str to str
        Description of each argument, by name.
    attributes : mapping of str to object
        Operator attributes, such as ``FInferType``.
    """
    # The process-wide registry outlives a reload of the module that registers.
    if name in tvm.ir._ffi_api.ListOpNames():
        return
    tvm.ir._ffi_api.RegisterOp(name, description)
    op = tvm.ir.Op.get(name)
    op.set_num_inputs(len(arguments))
    for argument, meaning in arguments.items():
        op.add_argument(argument, "Tensor", meaning)
    op.set_attrs_type_key("ir.DictAttrs")
    for key, value in attributes.items():
        tvm.ir.register_op_attr(name, key, value)


def _register() -> None:
    tvm_ffi.register_error(InvalidArgumentError)
    tvm_ffi.register_error(InvalidArgumentError.__name__, _CarriedError)
    register_operator(
        OP_NAME,
        "Deformable convolution v3: sampling and weighted sum.",
        _ARGUMENTS,
        {
            "FInferType": _infer_type,
            "FLegalize": _legalize,
            "FPurity": True,
            "FRelaxInferLayout": _infer_layout,
            "TMixedPrecisionPolicy": _MIXED_PRECISION_ALWAYS,
            "FInferMixedPrecision": _infer_mixed_precision,
        },
    )


_register()
