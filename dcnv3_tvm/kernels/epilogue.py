"""Epilogues: bias, activation and residual, applied to the sums of a kernel before the store."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from dcnv3_tvm.kernels.activations import activate
from dcnv3_tvm.op.expr import cast
from dcnv3_tvm.op.prim_func_builder import argument, compute


@dataclasses.dataclass(frozen=True)
class Epilogue:
    """What a kernel applies to its sums, in this order.

    Parameters
    ----------
    bias : bool
        Add a vector over the output channels.
    activation : str or None
        One of `dcnv3_tvm.kernels.activations.ACTIVATIONS`.
    residual : bool
        Add a tensor of the output's shape.
    """

    bias: bool = False
    activation: str | None = None
    residual: bool = False


def declare_epilogue(
    epilogue: Epilogue, shape: Sequence[Any], dtype: str, out_dtype: str
) -> Callable[[str, Any, Sequence[Any], Callable[..., list[Any]]], None]:
    """Declare the parameters ``[bias], [residual], out`` of a kernel with packed weights.

    The epilogue computes in `dtype`.

    Returns
    -------
    callable
        ``store(suffix, sums, extents, at)`` adds the block ``epilogue{suffix}`` over `extents`;
        ``at(*index)`` is the index in the output of the sum at `index`.
    """
    bias = argument("bias", shape[-1:], dtype) if epilogue.bias else None
    residual = argument("residual", shape, dtype) if epilogue.residual else None
    out = argument("out", shape, out_dtype)

    def value(total: Any, index: Sequence[Any]) -> Any:
        if bias is not None:
            total = total + bias[index[-1]]
        total = activate(epilogue.activation, total)
        return total if residual is None else total + residual[tuple(index)]

    def store(suffix: str, sums: Any, extents: Sequence[Any], at: Callable[..., list[Any]]) -> None:
        compute(
            f"epilogue{suffix}",
            extents,
            lambda *index: cast(out_dtype, value(sums[index], at(*index))),
            dtype=out_dtype,
            into=out,
            at=at,
        )

    return store
