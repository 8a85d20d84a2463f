"""Depthwise convolution, optionally followed by LayerNorm and an activation, in one kernel."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from typing import Any, Final

from tvm import tirx
from tvm.tirx.script import builder as T

from dcnv3_tvm.kernels.activations import activate
from dcnv3_tvm.kernels.convolution import output_extent, pad_image
from dcnv3_tvm.kernels.layer_norm import normalize
from dcnv3_tvm.op.expr import cast, int64, unflatten
from dcnv3_tvm.op.prim_func_builder import argument, compute, function

OPTIONS_ATTR: Final = "dcnv3_tvm.depthwise"
"""Function attribute with the options of a depthwise convolution, as JSON."""


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
        For GPUs: what lies between x and out is in runs of so many neighbouring pixels, each with
        the pixels that it sees, so that a thread's part has a known size where the width has none;
        and ``padded`` has the type of x, for loads of whole vectors, which a block ``converted``
        behind it converts.

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
    options = {
        "kernel_size": kernel_size,
        "stride": stride,
        "pad": pad,
        "bias": bias,
        "norm_eps": norm_eps,
        "activation": activation,
        "dtype": dtype,
        "x_dtype": x_dtype,
        "out_dtype": out_dtype,
    }
    with function("depthwise") as builder:
        T.func_attr({OPTIONS_ATTR: json.dumps(options)})
        x = argument("x", [batch, height, width, channels], x_dtype or dtype)
        weight = argument("weight", [*kernel_size, channels], dtype)
        shift = argument("bias", [channels], dtype) if bias else None
        normalized = norm_eps is not None
        gamma = argument("gamma", [channels], dtype) if normalized else None
        beta = argument("beta", [channels], dtype) if normalized else None
        stored = out_dtype or dtype
        out = argument("out", [batch, out_height, out_width, channels], stored)
        if run is None:
            outputs, dilation = (out_height, out_width), (1, 1)
            image = pad_image(x, outputs, kernel_size, stride, pad, dilation, dtype)
            columns: list[Any] = [out_width]
        else:
            # Written so that TVM sees, where the width is open, that the last pixel has a run.
            runs = tirx.floordiv(out_width - int64(1), int64(run)) + int64(1)
            columns = [runs, int64(run)]
            image = _runs(x, out_height, columns, kernel_size, stride, pad)
            if image.dtype != dtype:
                raw = image
                image = compute(
                    "converted", raw.shape, lambda *index: cast(dtype, raw[index]), dtype=dtype
                )

        def place(b: Any, i: Any, j: Any) -> tuple[Any, ...]:
            """Return where the sums of an output pixel are."""
            return b, i, *unflatten(j, columns)

        def seen(b: Any, i: Any, *index: Any) -> Any:
            """Multiply a pixel of a window by its weight."""
            *part, j, c, p, q = index
            pixel = (b, i * stride[0] + p, *part, j * stride[1] + q, c)
            return image[pixel] * weight[p, q, c]

        places = [batch, out_height, *columns]
        sums = compute(
            "window",
            [*places, channels],
            seen,
            reduce=kernel_size,
            start=None if shift is None else lambda *index: shift[index[-1]],
            dtype=dtype,
        )
        pixels = [batch, out_height, out_width]
        if norm_eps is None:
            compute(
                "epilogue",
                [*pixels, channels],
                lambda b, i, j, c: cast(stored, activate(activation, sums[(*place(b, i, j), c)])),
                dtype=stored,
                into=out,
            )
        else:
            normalize(
                places,
                channels,
                lambda *index: sums[index],
                gamma,
                beta,
                norm_eps,
                lambda *index: cast(stored, activate(activation, index[-1])),
                dtype=dtype,
                into=out,
                rows=pixels,
                place=place,
            )
    return builder.get()


def in_runs(func: tirx.PrimFunc, run: int) -> tirx.PrimFunc:
    """Build a kernel of `depthwise` anew, in runs."""
    options = json.loads(str(func.attrs[OPTIONS_ATTR]))
    pairs = {name: tuple(options[name]) for name in ("kernel_size", "stride", "pad")}
    *sizes, channels = func.params[0].shape
    return depthwise(*sizes, int(channels), **(options | pairs), run=run)


def _runs(
    x: Any,
    out_height: Any,
    columns: Sequence[Any],
    kernel_size: tuple[int, int],
    stride: tuple[int, int],
    pad: tuple[int, int],
) -> Any:
    """Add the block ``padded`` of an image in runs: those pixels of a row that a run sees."""
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

    return compute("padded", [*extents, channels], pixel, dtype=x.dtype)
