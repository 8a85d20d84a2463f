"""Blocks of unscheduled TensorIR functions, one call a block.

Like ``te.compute``, with one freedom more: where an element is stored need not be where the loops
stand. So a kernel loops over rows while its operands keep their leading dimensions, and a schedule
meets one row loop whatever their number.

All extents and loop variables are int64, so that more than 2**31 elements are addressed correctly.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script import builder as T

from dcnv3_tvm.op.expr import KERNEL_ATTR, int64


@contextlib.contextmanager
def function(kernel: str) -> Iterator[IRBuilder]:
    """Open a function; ``builder.get()`` returns it after the ``with``.

    Parameters
    ----------
    kernel : str
        Value of the attribute `KERNEL_ATTR`, and the function's name.
    """
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name(kernel)
        T.func_attr({"tirx.noalias": True, KERNEL_ATTR: kernel})
        yield builder


def argument(name: str, shape: Sequence[Any], dtype: str) -> Any:
    """Declare the next parameter."""
    return T.arg(name, T.buffer([int64(size) for size in shape], dtype))


def compute(
    name: str,
    extents: Sequence[Any],
    value: Callable[..., Any],
    *,
    dtype: str,
    reduce: Sequence[Any] = (),
    start: Callable[..., Any] | None = None,
    into: Any = None,
    at: Callable[..., Sequence[Any]] | None = None,
) -> Any:
    """Add a block that computes one element a point of `extents`.

    Parameters
    ----------
    name : str
        Name of the block, and of the buffer it makes.
    extents : sequence
        Extents of the spatial loops.
    value : callable
        Element as a function of the spatial, then the reduction variables.
    dtype : str
        Element type of the buffer it makes.
    reduce : sequence
        Extents of reduction loops; the values are summed over them.
    start : callable, optional
        What the sum starts from as a function of the spatial variables; zero by default.
    into : buffer, optional
        Where to store, instead of a new buffer of shape `extents`.
    at : callable, optional
        Position in the buffer as a function of the spatial variables; they themselves by default.

    Returns
    -------
    buffer
        The buffer written.
    """
    spatial = [int64(size) for size in extents]
    domain = [*spatial, *(int64(size) for size in reduce)]
    if into is None:
        into = T.sblock_alloc_buffer(spatial, dtype)
        IRBuilder.name(name, into)
    with T.grid(*domain) as loops, T.sblock(name):
        loops = [loops] if isinstance(loops, tirx.Var) else list(loops)
        points = [
            (T.axis.spatial if axis < len(spatial) else T.axis.reduce)(size, loop, "int64")
            for axis, (size, loop) in enumerate(zip(domain, loops, strict=True))
        ]
        place = points[: len(spatial)]
        target = list(at(*place)) if at is not None else place
        if reduce:
            with T.init():
                T.buffer_store(into, start(*place) if start else tirx.const(0, dtype), target)
            T.buffer_store(into, into[tuple(target)] + value(*points), target)
        else:
            T.buffer_store(into, value(*points), target)
    return into
