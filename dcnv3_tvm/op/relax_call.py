"""Calls of this package's Relax operators: building and reading them, and registration.

All operators have the parameters of DCNv3 as their attributes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Final

import tvm
import tvm_ffi
from tvm import relax, tirx
from tvm.target import Target

from dcnv3_tvm.errors import InvalidArgumentError
from dcnv3_tvm.op.expr import static
from dcnv3_tvm.spec import PARAMETERS, DCNv3Params, DCNv3Spec
from dcnv3_tvm.targets import is_gpu

_OPAQUE: Final = {"op_pattern": 8}
"""TVM's function attribute for kernels that FuseOps fuses nothing into."""


def make_call(name: str, arguments: Sequence[relax.Expr], params: DCNv3Params) -> relax.Call:
    """Build a call of an operator, not normalized."""
    attributes = tvm.ir.make_node("ir.DictAttrs", **dataclasses.asdict(params))
    return relax.Call(tvm.ir.Op.get(name), list(arguments), attrs=attributes)


def is_call(expr: object, *names: str) -> bool:
    """Return whether `expr` is a call of one of the operators with these names."""
    return isinstance(expr, relax.Call) and isinstance(expr.op, tvm.ir.Op) and expr.op.name in names


def params_of(call: relax.Call) -> DCNv3Params:
    """Read the parameters of a call from its attributes.

    Raises
    ------
    InvalidArgumentError
        If attributes are missing, unknown or invalid, as in a call that `make_call` did not build.
    """
    attributes = {} if call.attrs is None else dict(call.attrs.items())
    if set(attributes) != set(PARAMETERS):
        raise InvalidArgumentError(
            f"the attributes of {call.op.name} are not complete",
            got=", ".join(sorted(attributes)) or "none",
            allowed=", ".join(PARAMETERS),
            hint="Build the call with a function of dcnv3_tvm.op, such as relax_op.dcnv3(...).",
        )
    return DCNv3Params(**{name: plain(value) for name, value in attributes.items()})


def spec_of(call: relax.Call, *, x: int = 0) -> DCNv3Spec:
    """Return the specification of a call; sizes that are not constants become None.

    Parameters
    ----------
    call : relax.Call
        Call of one of the operators, normalized.
    x : int
        Which argument is x.

    Raises
    ------
    InvalidArgumentError
        If the channels or the dtype of x are unknown.
    """
    x_type = call.args[x].ty
    dims = dims_of(x_type)
    dtype = dtype_of(x_type)
    sizes = None if dims is None else [static(dim) for dim in dims]
    if sizes is None or sizes[3] is None or dtype is None:
        raise InvalidArgumentError(
            "the channels or the dtype of x are unknown",
            got=f"x: {x_type}",
            allowed="a tensor (N, H, W, C) with a constant C; N, H and W may be symbolic",
        )
    return DCNv3Spec.of(tuple(sizes), dtype=dtype, **params_of(call).keywords())


def plain(value: Any) -> Any:
    """Convert TVM's constants and arrays to Python values."""
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [plain(item) for item in value]
    return value.value if isinstance(value, (tirx.IntImm, tirx.FloatImm)) else value


def dims_of(tensor: relax.TensorType) -> list[Any] | None:
    """Return the dimensions of a tensor, None if they are unknown."""
    return list(tensor.shape.values) if isinstance(tensor.shape, relax.ShapeExpr) else None


def dtype_of(tensor: relax.TensorType) -> str | None:
    """Return the element type of a tensor, None if it is unknown."""
    return None if tensor.dtype is None else str(tensor.dtype.dtype)


def current_target_is_gpu() -> bool:
    """Return whether the target that TVM lowers for, if any, is a GPU."""
    target = Target.current(allow_none=True)
    return target is not None and is_gpu(target)


def add_kernel(builder: relax.BlockBuilder, kernel: tirx.PrimFunc, name: str) -> tvm.ir.GlobalVar:
    """Add a kernel to a module, or return the structurally equal one that is there.

    It is marked opaque, so that TVM fuses nothing into the kernel that a schedule rule expects.
    Without a global symbol, its name is made unique, and it is dropped from the module once nothing
    calls it.
    """
    return builder.add_func(kernel.without_attr("global_symbol").with_attrs(_OPAQUE), name)


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


tvm_ffi.register_error(InvalidArgumentError)
tvm_ffi.register_error(InvalidArgumentError.__name__, _CarriedError)
