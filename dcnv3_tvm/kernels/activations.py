"""Activation functions for the epilogues of kernels."""

from __future__ import annotations

from typing import Any, Final

from tvm import tirx

from dcnv3_tvm.errors import InvalidArgumentError
from dcnv3_tvm.op import math as fast

ACTIVATIONS: Final = ("gelu", "relu", "sigmoid", "silu")
"""Names that `activate` takes. GELU is the exact form, ``x * Phi(x)``."""


def activate(name: str | None, value: Any, *, stored: str = "float32") -> Any:
    """Apply an activation to an expression; ``None`` is the identity.

    Parameters
    ----------
    name : str or None
        One of `ACTIVATIONS`.
    value : expression
        In float32 or float64.
    stored : str
        Element type to which the result is rounded, which may need fewer digits.

    Raises
    ------
    InvalidArgumentError
        If the name is not one of `ACTIVATIONS`.
    """
    if name is None:
        return value
    one = tirx.const(1, "float32")
    if name == "gelu":
        return fast.gelu(value, stored=stored)
    if name == "relu":
        return tirx.max(value, tirx.const(0, "float32"))
    if name == "sigmoid":
        return one / (one + fast.exp(-value))
    if name == "silu":
        return value / (one + fast.exp(-value))
    raise InvalidArgumentError(
        "activation is unknown", got=repr(name), allowed=", ".join(ACTIVATIONS)
    )
