"""DCNv3 as a first-class operator of Relax, the graph language of TVM.

Older texts speak of registering an operator "in Relay". Relay has left TVM; Relax is its
successor, and this module registers what such a text asks for today: an operator with a name,
typed arguments and attributes which every Relax pass can look through. Importing the module
registers ``dcnv3_tvm.dcnv3`` once, from Python alone:

========================= =======================================================================
property                  what it does
========================= =======================================================================
``FInferType``            checks the call, and gives the type of the result for static, symbolic
                          and unknown shapes
``FLegalize``             ``LegalizeOps`` lowers the call to ``call_tir`` of the TensorIR kernel
``FPurity``               the call has no side effects: it may be moved, merged and removed
``FRelaxInferLayout``     ``ConvertLayout`` keeps the tensors NHWC, whatever it does around them
``TMixedPrecisionPolicy`` ``ToMixedPrecision`` gives the operator half-precision tensors; its
                          arithmetic stays float32 inside
========================= =======================================================================

The name is ``dcnv3_tvm.dcnv3`` and not ``relax.dcnv3``: printed TVMScript of an operator that
TVM does not ship parses back only under a prefix of its own. Print with
``script(show_meta=True)`` and read with `from_script`, which also takes symbolic shapes (TVM's own
parser loses what ties them to the function's). ``tvm.ir.save_json`` needs nothing.

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

from collections.abc import Sequence
from typing import Any, Final

import tvm
import tvm_ffi
from tvm import relax, s_tir, tirx

from dcnv3_tvm.dtypes import DTYPE_BYTES
from dcnv3_tvm.errors import InvalidArgumentError
from dcnv3_tvm.op import tensorir
from dcnv3_tvm.spec import DCNv3Spec, pair

OP_NAME: Final = "dcnv3_tvm.dcnv3"

_PAIRS: Final = ("kernel_size", "stride", "pad", "dilation")
_ATTRIBUTES: Final = (*_PAIRS, "group", "offset_scale", "remove_center", "softmax")
_ARGUMENTS: Final = {
    "x": "input (N, H, W, C)",
    "offset": "sampling offsets (N, Ho, Wo, G*P*2), x before y, in pixels",
    "mask": "modulation (N, Ho, Wo, G*P): weights, or logits with softmax=True",
}
_ALWAYS: Final = 0
"""Mixed-precision policy of TVM: cast the arguments to the half type."""


def dcnv3(
    x: relax.Expr,
    offset: relax.Expr,
    mask: relax.Expr,
    *,
    group: int,
    kernel_size: int | Sequence[int] = 3,
    stride: int | Sequence[int] = 1,
    pad: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    offset_scale: float = 1.0,
    remove_center: bool = False,
    softmax: bool = False,
) -> relax.Call:
    """Build a call of the operator.

    Parameters
    ----------
    x, offset, mask : relax.Expr
        Tensors of shape (N, H, W, C), (N, Ho, Wo, group*P*2) and (N, Ho, Wo, group*P).
    group, kernel_size, stride, pad, dilation, offset_scale, remove_center, softmax
        As in `dcnv3_tvm.DCNv3Spec`.

    Returns
    -------
    relax.Call
        Not normalised yet: emit it with a ``relax.BlockBuilder``, which infers and checks types.

    Raises
    ------
    InvalidArgumentError
        If an attribute is out of range. Shapes and dtypes are checked by the type inference.
    """
    attributes: dict[str, Any] = {
        "kernel_size": pair(kernel_size, "kernel_size"),
        "stride": pair(stride, "stride"),
        "pad": pair(pad, "pad"),
        "dilation": pair(dilation, "dilation"),
        "group": group,
        "offset_scale": float(offset_scale),
        "remove_center": bool(remove_center),
        "softmax": bool(softmax),
    }
    DCNv3Spec(batch=None, height=None, width=None, group_channels=1, **attributes)
    return relax.Call(
        tvm.ir.Op.get(OP_NAME),
        [x, offset, mask],
        attrs=tvm.ir.make_node("ir.DictAttrs", **attributes),
    )


def is_dcnv3(expr: object) -> bool:
    """Tell whether `expr` is a call of the operator."""
    return (
        isinstance(expr, relax.Call) and isinstance(expr.op, tvm.ir.Op) and expr.op.name == OP_NAME
    )


def attributes_of(call: relax.Call) -> dict[str, Any]:
    """Return the attributes of a call as plain values: the keyword arguments of `dcnv3`.

    Raises
    ------
    InvalidArgumentError
        If attributes are missing, unknown, or of another kind than `dcnv3` writes.
    """
    given = {} if call.attrs is None else dict(call.attrs.items())
    if set(given) != set(_ATTRIBUTES):
        raise InvalidArgumentError(
            f"the attributes of {OP_NAME} are not complete",
            got=", ".join(sorted(given)) or "none",
            allowed=", ".join(_ATTRIBUTES),
            hint="Build the call with dcnv3_tvm.op.relax_op.dcnv3(...).",
        )
    for name in ("remove_center", "softmax"):
        if not isinstance(given[name], (bool, int, tirx.IntImm)):
            raise InvalidArgumentError(f"{name} is not a boolean", got=repr(given[name]))
    if not isinstance(given["offset_scale"], (float, int, tirx.IntImm, tirx.FloatImm)):
        raise InvalidArgumentError("offset_scale is not a number", got=repr(given["offset_scale"]))
    attributes: dict[str, Any] = {}
    for name in _PAIRS:
        value = given[name]
        plain = [_plain(item) for item in value] if isinstance(value, Sequence) else _plain(value)
        attributes[name] = pair(plain, name)
    attributes["group"] = _plain(given["group"])
    attributes["offset_scale"] = float(_plain(given["offset_scale"]))
    attributes["remove_center"] = bool(_plain(given["remove_center"]))
    attributes["softmax"] = bool(_plain(given["softmax"]))
    return attributes


def spec_of(call: relax.Call) -> DCNv3Spec:
    """Describe the problem a call solves; a size that is not a constant becomes None.

    Raises
    ------
    InvalidArgumentError
        If the channels or the dtype of x are not known.
    """
    x_type = call.args[0].ty
    dims = _dims(x_type)
    dtype = _dtype(x_type)
    sizes = None if dims is None else [_constant(dim) for dim in dims]
    if sizes is None or sizes[3] is None or dtype is None:
        raise InvalidArgumentError(
            "the channels or the dtype of x are not known",
            got=f"x: {x_type}",
            allowed="a tensor (N, H, W, C) with a constant C; N, H and W may be symbolic",
        )
    return DCNv3Spec.of(tuple(sizes), dtype=dtype, **attributes_of(call))


def from_script(source: str) -> tvm.IRModule:
    """Read a module that ``module.script(show_meta=True)`` printed.

    TVM prints the result type of an operator that it does not ship into the metadata, where
    symbolic sizes are strangers to those of the function; here the types are inferred afresh.

    Raises
    ------
    InvalidArgumentError
        If a call of the operator in the text is not valid.
    """
    module = tvm.script.from_source(source, check_well_formed=False)
    for name, function in module.functions_items():
        if isinstance(function, relax.Function):
            module.update_func(name, _TypesAnew(module).visit_expr(function))
    return module


@relax.expr_functor.mutator
class _TypesAnew(relax.PyExprMutator):
    """Give every call of the operator the type that inference finds."""

    def visit_call_(self, call: relax.Call) -> relax.Expr:
        if not is_dcnv3(call):
            return super().visit_call_(call)
        arguments = [self.visit_expr(argument) for argument in call.args]
        return self.builder_.normalize(relax.Call(call.op, arguments, attrs=call.attrs))


def _plain(value: Any) -> Any:
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
            f"{OP_NAME} has another number of arguments",
            got=len(call.args),
            allowed=f"{len(_ARGUMENTS)}: {', '.join(_ARGUMENTS)}",
        )
    attributes = attributes_of(call)
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
    sizes = [None] * 4 if dims is None else [_constant(dim) for dim in dims]
    group = attributes["group"]
    # Where the channels are not known one channel a group stands for them: the checks of the
    # attributes and the shapes of offset and mask do not depend on it.
    known = sizes if sizes[3] is not None else [*sizes[:3], group]
    spec = DCNv3Spec.of(tuple(known), **attributes)
    expected = None if dims is None else _output_dims(dims, spec)
    _check_shape("offset", offset, expected, group * spec.points * 2, spec)
    _check_shape("mask", mask, expected, group * spec.points, spec)
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


def _output_dims(dims: list[Any], spec: DCNv3Spec) -> list[Any]:
    """Return N, Ho and Wo, as expressions of the dimensions of x."""
    analyzer = tvm.sym.Analyzer()
    extents = (spec.output_extent(dim, axis) for axis, dim in enumerate(dims[1:3]))
    return [dims[0], *(analyzer.simplify(extent) for extent in extents)]


def _check_shape(
    name: str,
    tensor: relax.TensorType,
    expected: list[Any] | None,
    last: int,
    spec: DCNv3Spec,
) -> None:
    """Refuse a shape that is known to be wrong; what is not known is left to the run time."""
    dims = _dims(tensor)
    if dims is None:
        return
    pairs = [(dims[3], last)]
    if expected is not None:
        pairs += list(zip(dims[:3], expected, strict=True))
    analyzer = tvm.sym.Analyzer()
    for got, allowed in pairs:
        difference = analyzer.simplify(got - allowed)
        if isinstance(difference, tirx.IntImm) and difference.value != 0:
            leading = ("N", "Ho", "Wo") if expected is None else expected
            raise InvalidArgumentError(
                f"{name} does not fit x and the attributes",
                got=f"shape {_shown(dims)}",
                allowed=f"shape {_shown([*leading, last])}",
                hint=f"{_ARGUMENTS[name]}, with {spec.group} groups of {spec.points} points, "
                f"kernel_size={spec.kernel_size}, stride={spec.stride}, pad={spec.pad}, "
                f"dilation={spec.dilation}.",
            )


def _shown(dims: Sequence[Any]) -> str:
    return f"({', '.join(str(_plain(dim)) for dim in dims)})"


def _legalize(builder: relax.BlockBuilder, call: relax.Call) -> relax.Expr:
    kernel = builder.add_func(tensorir.dcnv3(spec_of(call)), "dcnv3")
    return relax.call_tir(kernel, list(call.args), call.ty)


def _infer_layout(call: relax.Call, _desired: Any, _layouts: Any) -> tvm.ir.base.Node:
    """Ask for the layouts as written: a tensor that arrives transposed is transposed back."""
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
    """Keep the call: it accumulates in float32 and stores its arguments' dtype by itself."""
    return call


class _CarriedError(InvalidArgumentError):
    """An `InvalidArgumentError` that has passed through TVM's C++, which keeps its text alone."""

    def __init__(self, message: str) -> None:
        super().__init__(message.removesuffix("."))


def _register() -> None:
    tvm_ffi.register_error(InvalidArgumentError)
    tvm_ffi.register_error(InvalidArgumentError.__name__, _CarriedError)
    # The registry of operators belongs to the process, and outlives a reload of this module.
    if OP_NAME in tvm.ir._ffi_api.ListOpNames():
        return
    tvm.ir._ffi_api.RegisterOp(OP_NAME, "Deformable convolution v3: sampling and weighted sum.")
    op = tvm.ir.Op.get(OP_NAME)
    op.set_num_inputs(len(_ARGUMENTS))
    for name, description in _ARGUMENTS.items():
        op.add_argument(name, "Tensor", description)
    op.set_attrs_type_key("ir.DictAttrs")
    for key, value in (
        ("FInferType", _infer_type),
        ("FLegalize", _legalize),
        ("FPurity", True),
        ("FRelaxInferLayout", _infer_layout),
        ("TMixedPrecisionPolicy", _ALWAYS),
        ("FInferMixedPrecision", _infer_mixed_precision),
    ):
        tvm.ir.register_op_attr(OP_NAME, key, value)


_register()
