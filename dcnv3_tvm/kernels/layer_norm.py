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
    row_slack: int = 0,
    dtype: str = "float32",
    x_dtype: str | None = None,
    residual_dtype: str | None = None,
    out_dtype: str | None = None,
) -> tirx.PrimFunc:
    """Build ``out = activation((x - mean) / sqrt(var + eps) * gamma + beta) + residual``.

    Mean and (biased) variance are over the last axis; the variance is that of the deviations.

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
    row_slack : int
        Rows normalized beyond the last, which repeat it and are not stored, as for
        `dcnv3_tvm.kernels.matmul.matmul`.
    dtype : str
        Element type of the computation and of all tensors.
    x_dtype, residual_dtype, out_dtype : str, optional
        Other element types for x, residual and out.

    Returns
    -------
    tvm.tirx.PrimFunc
        Function of x (*lead, C), gamma (C,), beta (C,), [residual (*lead, C)], out (*lead, C);
        unscheduled blocks ``total``, ``square``, ``scale`` and ``epilogue``, preceded by
        ``converted`` if x is of another type than the computation.
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
        converted = None
        if x.dtype != dtype:
            # Converted once, because it is read three times.
            converted = compute(
                "converted",
                [rows, channels],
                lambda m, c: cast(dtype, x[(*unflatten(m, lead), c)]),
                dtype=dtype,
            )

        def value(m: Any, c: Any) -> Any:
            row = tirx.min(m, rows - 1) if row_slack else m
            return x[(*unflatten(row, lead), c)] if converted is None else converted[row, c]

        def finish(m: Any, c: Any, normal: Any) -> Any:
            result = activate(activation, normal, stored=stored)
            if added is not None:
                result = result + cast(dtype, added[(*unflatten(m, lead), c)])
            return cast(stored, result)

        normalize(
            [rows + row_slack if row_slack else rows],
            channels,
            value,
            gamma,
            beta,
            eps,
            finish,
            dtype=dtype,
            into=out,
            at=lambda m, c: [*unflatten(m, lead), c],
            rows=[rows],
        )
    return builder.get()


def normalize(
    extents: Sequence[Any],
    channels: int,
    value: Callable[..., Any],
    gamma: Any,
    beta: Any,
    eps: float,
    finish: Callable[..., Any],
    *,
    dtype: str,
    into: Any,
    at: Callable[..., Sequence[Any]] | None = None,
    rows: Sequence[Any] | None = None,
    position: Callable[..., tuple[Any, ...]] = lambda *row: row,
) -> None:
    """Add the blocks of a LayerNorm of ``value(*index, c)`` over the channels c.

    Parameters
    ----------
    extents : sequence
        Extents of the index.
    channels : int
        Extent of c.
    value : callable
        Element to normalize.
    gamma, beta : buffer
        Scale and shift, of shape (channels,).
    eps : float
        Added to the variance.
    finish : callable
        What to store for ``(*row, c, normalized)``.
    dtype : str
        Element type of the computation.
    into : buffer
        Where to store.
    at : callable, optional
        Position in `into` of ``(*row, c)``; by default that itself.
    rows : sequence, optional
        Extents of the rows to store; by default `extents`.
    position : callable
        Index of a row.
    """
    share = tirx.const(1.0 / channels, dtype)
    total = compute("total", extents, value, reduce=[channels], dtype=dtype)

    def deviation(*index: Any) -> Any:
        return value(*index) - total[index[:-1]] * share

    square = compute(
        "square",
        extents,
        lambda *index: deviation(*index) * deviation(*index),
        reduce=[channels],
        dtype=dtype,
    )
    scale = compute(
        "scale",
        extents,
        lambda *index: (
            tirx.const(1, dtype) / tirx.sqrt(square[index] * share + tirx.const(eps, dtype))
        ),
        dtype=dtype,
    )

    def store(*index: Any) -> Any:
        *row, channel = index
        found = position(*row)
        normalized = deviation(*found, channel) * scale[found]
        return finish(*index, normalized * gamma[channel] + beta[channel])

    compute("epilogue", [*(rows or extents), channels], store, dtype=dtype, into=into, at=at)
