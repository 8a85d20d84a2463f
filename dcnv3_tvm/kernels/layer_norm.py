"""LayerNorm over the channels."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

from tvm import tirx

from dcnv3_tvm.kernels.activations import activate
from dcnv3_tvm.op.expr import cast, int64, product, unflatten
from dcnv3_tvm.op.prim_func_builder import argument, compute, function


@functools.lru_cache(maxsize=256)
def layer_norm(
    lead: Sequence[Any],
    channels: int,
    *,
    eps: float,
    activation: str | None = None,
    residual: bool = False,
    dtype: str = "float32",
    x_dtype: str | None = None,
    residual_dtype: str | None = None,
    out_dtype: str | None = None,
) -> tirx.PrimFunc:
    """Build ``out = activation((x - mean) / sqrt(var + eps) * gamma + beta) + residual``.

    Mean and (biased) variance are taken over the last axis, the variance from the deviations.

    Parameters
    ----------
    lead : sequence of int or tirx.Var
        Leading dimensions of x and out.
    channels : int
        C.
    eps : float
        Added to the variance.
    activation : str or None
        One of `dcnv3_tvm.kernels.activations.ACTIVATIONS`.
    residual : bool
        Whether a tensor of the output's shape is added last.
    dtype : str
        Element type of the computation and of all tensors.
    x_dtype, residual_dtype, out_dtype : str, optional
        Other element types for x, residual and out.

    Returns
    -------
    tvm.tirx.PrimFunc
        Function of x (*lead, C), gamma (C,), beta (C,), [residual (*lead, C)], out (*lead, C);
        unscheduled blocks ``total``, ``square``, ``scale`` and ``epilogue``, before them ``given``
        if x is of another type than the computation.
    """
    lead = [int64(size) for size in lead]
    rows = product(lead)
    with function("layer_norm") as builder:
        x = argument("x", [*lead, channels], x_dtype or dtype)
        gamma = argument("gamma", [channels], dtype)
        beta = argument("beta", [channels], dtype)
        shape = [*lead, channels]
        added = argument("residual", shape, residual_dtype or dtype) if residual else None
        stored = out_dtype or dtype
        out = argument("out", [*lead, channels], stored)
        given = None
        if x.dtype != dtype:
            # Converted once: it is read three times.
            given = compute(
                "given",
                [rows, channels],
                lambda m, c: cast(dtype, x[(*unflatten(m, lead), c)]),
                dtype=dtype,
            )

        def value(m: Any, c: Any) -> Any:
            return x[(*unflatten(m, lead), c)] if given is None else given[m, c]

        def finish(m: Any, c: Any, normal: Any) -> Any:
            result = activate(activation, normal)
            if added is not None:
                result = result + cast(dtype, added[(*unflatten(m, lead), c)])
            return cast(stored, result)

        normalize(
            [rows],
            channels,
            value,
            gamma,
            beta,
            eps,
            finish,
            dtype=dtype,
            into=out,
            at=lambda m, c: [*unflatten(m, lead), c],
        )
    return builder.get()


def normalize(
    places: Sequence[Any],
    channels: int,
    value: Any,
    gamma: Any,
    beta: Any,
    eps: float,
    finish: Any,
    *,
    dtype: str,
    into: Any,
    at: Any = None,
    rows: Sequence[Any] | None = None,
    place: Callable[..., tuple[Any, ...]] = lambda *row: row,
) -> None:
    """Add the blocks of a LayerNorm of ``value(*place, c)``.

    ``finish(*row, c, normal)`` is stored, where `rows`, by default `places`, are the extents of
    the rows, and ``place(*row)`` is the place of one.
    """
    share = tirx.const(1.0 / channels, dtype)
    total = compute("total", places, value, reduce=[channels], dtype=dtype)

    def deviation(*index: Any) -> Any:
        return value(*index) - total[index[:-1]] * share

    square = compute(
        "square",
        places,
        lambda *index: deviation(*index) * deviation(*index),
        reduce=[channels],
        dtype=dtype,
    )
    scale = compute(
        "scale",
        places,
        lambda *place: (
            tirx.const(1, dtype) / tirx.sqrt(square[place] * share + tirx.const(eps, dtype))
        ),
        dtype=dtype,
    )

    def normal(*index: Any) -> Any:
        *row, channel = index
        found = place(*row)
        normalized = deviation(*found, channel) * scale[found]
        return finish(*index, normalized * gamma[channel] + beta[channel])

    compute("epilogue", [*(rows or places), channels], normal, dtype=dtype, into=into, at=at)
