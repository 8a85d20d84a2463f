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


@dataclasses.dataclass(frozen=True)
class DeclaredEpilogue:
    """An epilogue whose parameters are declared, by `declare_epilogue`.

    Parameters
    ----------
    epilogue : Epilogue
        What is applied.
    bias, residual : buffer or None
        Parameters of the kernel.
    out : buffer
        Parameter of the kernel.
    """

    epilogue: Epilogue
    bias: Any
    residual: Any
    out: Any

    def value(self, total: Any, index: Sequence[Any]) -> Any:
        """Return what a sum at an index of the output becomes, before it is rounded."""
        if self.bias is not None:
            total = total + self.bias[index[-1]]
        total = activate(self.epilogue.activation, total, stored=str(self.out.dtype))
        return total if self.residual is None else total + self.residual[tuple(index)]

    def store(
        self, suffix: str, sums: Any, extents: Sequence[Any], at: Callable[..., list[Any]]
    ) -> None:
        """Add the block ``epilogue{suffix}`` over extents.

        ``at(*index)`` is the index in the output of the sum at `index`.
        """
        dtype = str(self.out.dtype)
        compute(
            f"epilogue{suffix}",
            extents,
            lambda *index: cast(dtype, self.value(sums[index], at(*index))),
            dtype=dtype,
            into=self.out,
            at=at,
        )


def declare_epilogue(
    epilogue: Epilogue, shape: Sequence[Any], dtype: str, out_dtype: str
) -> DeclaredEpilogue:
    """Declare the parameters ``[bias], [residual], out`` of a kernel with packed weights.

    The epilogue computes in `dtype`.
    """
    bias = argument("bias", shape[-1:], dtype) if epilogue.bias else None
    residual = argument("residual", shape, dtype) if epilogue.residual else None
    return DeclaredEpilogue(epilogue, bias, residual, argument("out", shape, out_dtype))
