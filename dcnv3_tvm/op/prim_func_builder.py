"""Build unscheduled TensorIR functions block by block, from Python.

`compute` is like ``te.compute``, except that the stored element's position may differ from the loop
variables: a kernel can loop over flattened rows while its operands keep all leading dimensions, so
a schedule sees one row loop for any rank. `block` gives full control over axes, regions and stores.

All extents and loop variables are int64, so that tensors of more than 2**31 elements are addressed
correctly.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script import builder as T

from dcnv3_tvm.op.expr import KERNEL_ATTR, int64


@contextlib.contextmanager
def function(kernel: str, attributes: Mapping[str, Any] | None = None) -> Iterator[IRBuilder]:
    """Open a function; ``builder.get()`` returns it after the ``with`` statement.

    Parameters
    ----------
    kernel : str
        Name of the function, and value of its attribute `KERNEL_ATTR`.
    attributes : mapping of str to object, optional
        More attributes of the function.
    """
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name(kernel)
        T.func_attr({"tirx.noalias": True, KERNEL_ATTR: kernel, **(attributes or {})})
        yield builder


def argument(name: str, shape: Sequence[Any], dtype: str, *, align: int = 0) -> Any:
    """Declare the next parameter: a tensor whose data starts at a multiple of `align` bytes.

    With 0, TVM assumes its default of 64 bytes.
    """
    return T.arg(name, T.buffer([int64(size) for size in shape], dtype, align=align))


def allocate(name: str, shape: Sequence[Any], dtype: str) -> Any:
    """Allocate an intermediate buffer."""
    buffer = T.sblock_alloc_buffer([int64(size) for size in shape], dtype)
    IRBuilder.name(name, buffer)
    return buffer


@contextlib.contextmanager
def block(name: str, extents: Sequence[Any], kinds: str) -> Iterator[list[Any]]:
    """Open a block inside a nest of one loop per extent; yields its axes.

    Parameters
    ----------
    name : str
        Name of the block.
    extents : sequence
        Extents of the loops, outermost first.
    kinds : str
        One letter per loop: S for spatial, R for reduction.
    """
    sizes = [int64(size) for size in extents]
    with T.grid(*sizes) as loops, T.sblock(name):
        loops = [loops] if isinstance(loops, tirx.Var) else list(loops)
        yield [
            (T.axis.spatial if kind == "S" else T.axis.reduce)(size, loop, "int64")
            for kind, size, loop in zip(kinds, sizes, loops, strict=True)
        ]


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
    """Add a block that computes one element for each point of `extents`.

    Parameters
    ----------
    name : str
        Name of the block, and of the buffer it allocates.
    extents : sequence
        Extents of the spatial loops.
    value : callable
        Element as a function of the spatial, then the reduction variables.
    dtype : str
        Element type of the allocated buffer, and of the sum.
    reduce : sequence
        Extents of reduction loops, over which the values are summed.
    start : callable, optional
        Initial value of the sum as a function of the spatial variables; zero by default.
    into : buffer, optional
        Existing buffer to store into; by default one of shape `extents` is allocated.
    at : callable, optional
        Position in the buffer as a function of the spatial variables; the variables themselves by
        default.

    Returns
    -------
    buffer
        The buffer written.
    """
    if into is None:
        into = allocate(name, extents, dtype)
    kinds = "S" * len(extents) + "R" * len(reduce)
    with block(name, [*extents, *reduce], kinds) as axes:
        spatial = axes[: len(extents)]
        position = list(at(*spatial)) if at is not None else spatial
        element = value(*axes)
        if reduce:
            with T.init():
                initial = start(*spatial) if start else tirx.const(0, dtype)
                T.buffer_store(into, initial, position)
            element = into[tuple(position)] + element
        T.buffer_store(into, element, position)
    return into
