"""Type inference that the Relax operators share: checks of arguments, and the type of the result.

Shapes may be static, symbolic or unknown. What is provably wrong is rejected; the rest is checked
at run time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import tvm
from tvm import relax, tirx

from dcnv3_tvm.dtypes import DTYPE_BYTES
from dcnv3_tvm.errors import InvalidArgumentError
from dcnv3_tvm.op.expr import static
from dcnv3_tvm.op.relax_call import dims_of, dtype_of, params_of, plain
from dcnv3_tvm.spec import DCNv3Params, DCNv3Spec

ARGUMENTS: Final = {
    "x": "input (N, H, W, C)",
    "offset": "sampling offsets (N, Ho, Wo, G*P*2), x before y, in pixels",
    "mask": "modulation (N, Ho, Wo, G*P): weights, or logits with softmax=True",
}
"""Descriptions of DCNv3's arguments, by name."""


def argument_types(call: relax.Call, arguments: Mapping[str, str]) -> dict[str, relax.TensorType]:
    """Return the types of a call's arguments, which all are tensors of one supported dtype.

    Parameters
    ----------
    call : relax.Call
        The call.
    arguments : mapping of str to str
        Descriptions of the arguments, by name.

    Raises
    ------
    InvalidArgumentError
        If their number, a rank or a dtype is wrong.
    """
    if len(call.args) != len(arguments):
        raise InvalidArgumentError(
            f"{call.op.name} has the wrong number of arguments",
            got=len(call.args),
            allowed=f"{len(arguments)}: {', '.join(arguments)}",
        )
    types = {}
    for name, argument in zip(arguments, call.args, strict=True):
        if not isinstance(argument.ty, relax.TensorType):
            raise InvalidArgumentError(
                f"{name} is not a tensor", got=str(argument.ty), allowed=arguments[name]
            )
        if argument.ty.ndim not in (-1, 4):
            raise InvalidArgumentError(
                f"{name} does not have four dimensions",
                got=str(argument.ty),
                allowed=arguments[name],
            )
        types[name] = argument.ty
    _check_dtypes(types)
    return types


def result_type(call: relax.Call, types: Mapping[str, relax.TensorType]) -> relax.TensorType:
    """Check x, offset and mask against each other; return the type of DCNv3's result.

    Parameters
    ----------
    call : relax.Call
        Call with the attributes of DCNv3.
    types : mapping of str to relax.TensorType
        Types of x, offset and mask, from `argument_types`.

    Raises
    ------
    InvalidArgumentError
        If a shape or an attribute is invalid.
    """
    params = params_of(call)
    x = types["x"]
    dims = dims_of(x)
    sizes: list[int | None] = [None] * 4 if dims is None else [static(dim) for dim in dims]
    if sizes[3] is None:
        # No check of a parameter or of another tensor depends on the channels in a group.
        sizes[3] = params.group
    DCNv3Spec.of(sizes, **params.keywords())
    expected = None if dims is None else _output_dims(dims, params)
    for name, channels in (("offset", params.offset_channels), ("mask", params.mask_channels)):
        leading = ["N", "Ho", "Wo"] if expected is None else expected
        check_shape(name, types[name], [*leading, channels], params)
    if dims is None or expected is None:
        return relax.TensorType(dtype=x.dtype, vdevice=x.vdevice, ndim=4)
    return relax.TensorType([*expected, dims[3]], x.dtype, x.vdevice)


def check_shape(
    name: str,
    tensor: relax.TensorType,
    allowed: Sequence[Any],
    params: DCNv3Params,
    meaning: str | None = None,
) -> None:
    """Reject a shape that is provably wrong; dynamic sizes are checked at run time.

    Parameters
    ----------
    name : str
        Name of the argument.
    tensor : relax.TensorType
        Its type.
    allowed : sequence
        Its dimensions; the name of one that is unknown.
    params : DCNv3Params
        Parameters, for the message.
    meaning : str, optional
        Description of the argument, by default that in `ARGUMENTS`.

    Raises
    ------
    InvalidArgumentError
        If a dimension differs.
    """
    dims = dims_of(tensor)
    if dims is None:
        return
    analyzer = tvm.sym.Analyzer()
    for got, dim in zip(dims, allowed, strict=True):
        difference = None if isinstance(dim, str) else analyzer.simplify(got - dim)
        if isinstance(difference, tirx.IntImm) and difference.value != 0:
            raise InvalidArgumentError(
                f"{name} does not match x and the attributes",
                got=f"shape {_shown(dims)}",
                allowed=f"shape {_shown(allowed)}",
                hint=f"{meaning or ARGUMENTS[name]}, with {params.group} groups of {params.points} "
                f"points, kernel_size={params.kernel_size}, stride={params.stride}, "
                f"pad={params.pad}, dilation={params.dilation}.",
            )


def _check_dtypes(types: Mapping[str, relax.TensorType]) -> None:
    dtypes = {name: dtype_of(tensor) for name, tensor in types.items()}
    got = ", ".join(f"{name}: {dtype}" for name, dtype in dtypes.items())
    given = {dtype for dtype in dtypes.values() if dtype is not None}
    if len(given) > 1:
        *others, last = types
        raise InvalidArgumentError(
            f"{', '.join(others)} and {last} differ in dtype",
            got=got,
            hint="Cast them to one with relax.op.astype.",
        )
    if given and given.isdisjoint(DTYPE_BYTES):
        raise InvalidArgumentError(
            "the dtype is not supported", got=got, allowed=", ".join(DTYPE_BYTES)
        )


def _output_dims(dims: list[Any], params: DCNv3Params) -> list[Any]:
    """Return N, Ho and Wo as expressions of the dimensions of x."""
    analyzer = tvm.sym.Analyzer()
    extents = (params.output_extent(dim, axis) for axis, dim in enumerate(dims[1:3]))
    return [dims[0], *(analyzer.simplify(extent) for extent in extents)]


def _shown(dims: Sequence[Any]) -> str:
    return f"({', '.join(str(plain(dim)) for dim in dims)})"
