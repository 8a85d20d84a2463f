"""LayerNorm over the channels, alone or behind a depthwise convolution, in one kernel."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from tvm import tirx

from dcnv3_tvm.op.activations import activate
from dcnv3_tvm.op.products import output_extent, padded
from dcnv3_tvm.op.stages import argument, cast, compute, function, int64, product, unflatten


@functools.lru_cache(maxsize=256)
def layer_norm(
    lead: Sequence[Any],
    channels: int,
    *,
    eps: float,
    activation: str | None = None,
    residual: bool = False,
    dtype: str = "float32",
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
        One of `dcnv3_tvm.op.activations.ACTIVATIONS`.
    residual : bool
        Whether a tensor of the output's shape is added last.
    dtype : str
        Element type of all tensors.
    out_dtype : str, optional
        Another element type for out.

    Returns
    -------
    tvm.tirx.PrimFunc
        Function of x (*lead, C), gamma (C,), beta (C,), [residual (*lead, C)], out (*lead, C);
        unscheduled blocks ``total``, ``square``, ``scale`` and ``epilogue``.
    """
    lead = [int64(size) for size in lead]
    rows = product(lead)
    with function("layer_norm") as builder:
        x = argument("x", [*lead, channels], dtype)
        gamma = argument("gamma", [channels], dtype)
        beta = argument("beta", [channels], dtype)
        added = argument("residual", [*lead, channels], dtype) if residual else None
        stored = out_dtype or dtype
        out = argument("out", [*lead, channels], stored)

        def value(m: Any, c: Any) -> Any:
            return x[(*unflatten(m, lead), c)]

        def finish(m: Any, c: Any, normal: Any) -> Any:
            result = activate(activation, normal)
            if added is not None:
                result = result + added[(*unflatten(m, lead), c)]
            return cast(stored, result)

        _normalize(
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


@functools.lru_cache(maxsize=256)
def depthwise(
    batch: Any,
    height: Any,
    width: Any,
    channels: int,
    *,
    kernel_size: tuple[int, int],
    stride: tuple[int, int] = (1, 1),
    pad: tuple[int, int],
    bias: bool,
    norm_eps: float | None = None,
    activation: str | None = None,
    dtype: str = "float32",
    x_dtype: str | None = None,
    out_dtype: str | None = None,
) -> tirx.PrimFunc:
    """Build a depthwise convolution of channels-last tensors, with LayerNorm and activation.

    Parameters
    ----------
    batch, height, width : int or tirx.Var
        Sizes of x.
    channels : int
        C.
    kernel_size, stride, pad : (int, int)
        (height, width) pairs.
    bias : bool
        Whether a vector over the channels is added.
    norm_eps : float or None
        ``eps`` of a LayerNorm over the channels; ``None`` leaves the LayerNorm out.
    activation : str or None
        One of `dcnv3_tvm.op.activations.ACTIVATIONS`.
    dtype : str
        Element type of the computation and of all tensors.
    x_dtype, out_dtype : str, optional
        Other element types for x and out.

    Returns
    -------
    tvm.tirx.PrimFunc
        Function of x (N, H, W, C), weight (kh, kw, C), [bias (C,)], [gamma (C,), beta (C,)],
        out (N, Ho, Wo, C); unscheduled blocks ``padded``, ``window``, those of `layer_norm` if
        it is asked for, and ``epilogue``.
    """
    batch, height, width = int64(batch), int64(height), int64(width)
    out_height, out_width = (
        output_extent(size, kernel_size[axis], stride[axis], pad[axis], 1)
        for axis, size in enumerate((height, width))
    )
    with function("depthwise") as builder:
        x = argument("x", [batch, height, width, channels], x_dtype or dtype)
        weight = argument("weight", [*kernel_size, channels], dtype)
        shift = argument("bias", [channels], dtype) if bias else None
        normalized = norm_eps is not None
        gamma = argument("gamma", [channels], dtype) if normalized else None
        beta = argument("beta", [channels], dtype) if normalized else None
        stored = out_dtype or dtype
        out = argument("out", [batch, out_height, out_width, channels], stored)
        image = padded(x, (out_height, out_width), kernel_size, stride, pad, (1, 1), dtype)
        sums = compute(
            "window",
            [batch, out_height, out_width, channels],
            lambda b, i, j, c, p, q: (
                image[b, i * stride[0] + p, j * stride[1] + q, c] * weight[p, q, c]
            ),
            reduce=kernel_size,
            start=None if shift is None else lambda _b, _i, _j, c: shift[c],
            dtype=dtype,
        )

        def value(*index: Any) -> Any:
            return sums[index]

        places = [batch, out_height, out_width]
        if norm_eps is None:
            compute(
                "epilogue",
                [*places, channels],
                lambda *index: cast(stored, activate(activation, value(*index))),
                dtype=stored,
                into=out,
            )
        else:
            _normalize(
                places,
                channels,
                value,
                gamma,
                beta,
                norm_eps,
                lambda *index: cast(stored, activate(activation, index[-1])),
                dtype=dtype,
                into=out,
            )
    return builder.get()


def _normalize(
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
) -> None:
    """Add the blocks of a LayerNorm of ``value(*place, c)``.

    ``finish(*place, c, normal)`` is stored.
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
        channel = index[-1]
        return finish(
            *index, deviation(*index) * scale[index[:-1]] * gamma[channel] + beta[channel]
        )

    compute("epilogue", [*places, channels], normal, dtype=dtype, into=into, at=at)
