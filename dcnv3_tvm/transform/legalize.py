"""Legalizations of operators whose default in TVM is slow."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from tvm import relax, te

from dcnv3_tvm.op import math


def _gelu(builder: relax.BlockBuilder, call: relax.Call) -> relax.Expr:
    def gelu(x: te.Tensor) -> te.Tensor:
        return te.compute(x.shape, lambda *index: math.gelu(x(*index)), name="gelu")

    return builder.call_te(gelu, call.args[0])


LEGALIZATIONS: Final[dict[str, Callable[..., Any]]] = {"relax.nn.gelu": _gelu}
"""By operator. TVM's GELU calls the C library's scalar erf for every element."""
