"""Depthwise convolution, optionally followed by LayerNorm and an activation, in one kernel."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from tvm import tirx

from dcnv3_tvm.kernels.activations import activate
from dcnv3_tvm.kernels.convolution import output_size, pad_image
from dcnv3_tvm.kernels.layer_norm import normalize
from dcnv3_tvm.op.expr import cast, int64, unflatten
from dcnv3_tvm.op.prim_func_builder import argument, compute, function


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
    run: int | None = None,
    row_slack: int = 0,
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
        One of `dcnv3_tvm.kernels.activations.ACTIVATIONS`.
    dtype : str
        Element type of the computation and of all tensors.
    x_dtype, out_dtype : str, optional
        Other element types for x and out.
    run : int, optional
        Compute the rows of out in runs of so many neighbouring pixels, each from its own padded
        part of x: all sizes of a run are static, whatever the width. ``padded`` then has the type
        of x, so that whole vectors can be copied, and a block ``converted`` converts it.
    row_slack : int
        Without runs, pixels computed beyond the last of each output row, which are not stored, as
        for `dcnv3_tvm.kernels.convolution.convolution`.

    Returns
    -------
    tvm.tirx.PrimFunc
        Function of x (N, H, W, C), weight (kh, kw, C), [bias (C,)], [gamma (C,), beta (C,)],
        out (N, Ho, Wo, C); unscheduled blocks ``padded``, ``window``, those of `normalize` with
        a LayerNorm, and ``epilogue``. ``window`` is over (n, ho, wo, c, kh, kw), in runs over
        (n, ho, run, pixel, c, kh, kw).
    """
    batch, height, width = int64(batch), int64(height), int64(width)
    out_height, out_width = output_size((height, width), kernel_size, stride, pad)
    with function("depthwise") as builder:
        x = argument("x", [batch, height, width, channels], x_dtype or dtype)
        weight = argument("weight", [*kernel_size, channels], dtype)
        shift = argument("bias", [channels], dtype) if bias else None
        normalized = norm_eps is not None
        gamma = argument("gamma", [channels], dtype) if normalized else None
        beta = argument("beta", [channels], dtype) if normalized else None
        stored = out_dtype or dtype
        out = argument("out", [batch, out_height, out_width, channels], stored)
        if run is None:
            wide = out_width + row_slack if row_slack else out_width
            columns: list[Any] = [wide]
            image = pad_image(x, (out_height, wide), kernel_size, stride, pad, dtype)
        else:
            # ceil(width / run) in a form from which TVM sees, for a symbolic width, that the last
            # pixel has a run.
            columns = [tirx.floordiv(out_width - int64(1), int64(run)) + int64(1), int64(run)]
            image = _pad_runs(x, out_height, columns, kernel_size, stride, pad, dtype)

        def position(b: Any, i: Any, j: Any) -> tuple[Any, ...]:
            """Return the index of an output pixel in the sums."""
            return b, i, *unflatten(j, columns)

        def term(b: Any, i: Any, *index: Any) -> Any:
            """Multiply a pixel of the window by its weight."""
            *part, j, c, p, q = index
            pixel = (b, i * stride[0] + p, *part, j * stride[1] + q, c)
            return image[pixel] * weight[p, q, c]

        extents = [batch, out_height, *columns]
        sums = compute(
            "window",
            [*extents, channels],
            term,
            reduce=kernel_size,
            start=None if shift is None else lambda *index: shift[index[-1]],
            dtype=dtype,
        )

        def finish(value: Any) -> Any:
            return cast(stored, activate(activation, value, stored=stored))

        pixels = [batch, out_height, out_width]
        if norm_eps is None:
            compute(
                "epilogue",
                [*pixels, channels],
                lambda b, i, j, c: finish(sums[(*position(b, i, j), c)]),
                dtype=stored,
                into=out,
            )
        else:
            normalize(
                extents,
                channels,
                lambda *index: sums[index],
                gamma,
                beta,
                norm_eps,
                lambda *index: finish(index[-1]),
                dtype=dtype,
                into=out,
                rows=pixels,
                position=position,
            )
    return builder.get()


def _pad_runs(
    x: Any,
    out_height: Any,
    columns: Sequence[Any],
    kernel_size: tuple[int, int],
    stride: tuple[int, int],
    pad: tuple[int, int],
    dtype: str,
) -> Any:
    """Add the block ``padded`` of an image in runs: the pixels of each row that a run reads.

    Where x is of another type than `dtype`, a block ``converted`` follows.
    """
    batch, height, width, channels = x.shape
    runs, run = columns
    extents = [
        batch,
        (out_height - 1) * stride[0] + kernel_size[0],
        runs,
        (run - 1) * stride[1] + kernel_size[1],
    ]

    def pixel(b: Any, i: Any, part: Any, j: Any, c: Any) -> Any:
        row, column = i - pad[0], part * run * stride[1] + j - pad[1]
        inside = tirx.all(row >= 0, row < height, column >= 0, column < width)
        return tirx.if_then_else(inside, x[b, row, column, c], tirx.const(0, x.dtype))

    padded = compute("padded", [*extents, channels], pixel, dtype=x.dtype)
    if x.dtype == dtype:
        return padded
    return compute(
        "converted", padded.shape, lambda *index: cast(dtype, padded[index]), dtype=dtype
    )
