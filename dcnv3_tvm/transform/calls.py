"""Calls of Relax operators, read and changed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tvm
from tvm import relax


def with_attributes(call: relax.Call, args: Sequence[relax.Expr], **changed: Any) -> relax.Call:
    """Return a call of the same operator with other arguments, and some attributes changed."""
    if not changed:
        return relax.Call(call.op, list(args), call.attrs)
    kind = type(call.attrs).__tvm_ffi_type_info__
    kept = {field.name: getattr(call.attrs, field.name) for field in kind.fields}
    return relax.Call(call.op, list(args), tvm.ir.make_node(kind.type_key, **(kept | changed)))


def transpose_axes(call: relax.Call) -> list[int]:
    """Return the axes of a ``permute_dims``: axis i of its result is axis ``axes[i]`` before it."""
    rank = call.args[0].ty.ndim
    if call.attrs.axes is None:
        return list(reversed(range(rank)))
    return [int(axis) % rank for axis in call.attrs.axes]
