"""Dense convolution with packed weights, its epilogue in the same kernel, for CPUs."""

from __future__ import annotations

import functools
from typing import Any

from tvm import tirx
from tvm.sym import Analyzer

from dcnv3_tvm.kernels.epilogue import Epilogue, declare_epilogue
from dcnv3_tvm.kernels.packing import column_parts
from dcnv3_tvm.op.expr import cast, int64, static
from dcnv3_tvm.op.prim_func_builder import argument, compute, function


@functools.lru_cache(maxsize=256)
def convolution(
    batch: Any,
    height: Any,
    width: Any,
    in_channels: int,
    out_channels: int,
    *,
    kernel_size: tuple[int, int],
    stride: tuple[int, int],
    pad: tuple[int, int],
    tile: int,
    row_slack: int = 0,
    epilogue: Epilogue | None = None,
    dtype: str = "float32",
) -> tirx.PrimFunc:
    """Build a zero-padded dense convolution of channels-last tensors.

    Parameters
    ----------
    batch, height, width : int or tirx.Var
        Sizes of x.
    in_channels, out_channels : int
        C and O.
    kernel_size, stride, pad : (int, int)
        (height, width) pairs.
    tile : int
        Output channels of a weight tile.
    row_slack : int
        Pixels computed beyond the last of each output row, which are not stored: a schedule can
        then use tiles of any width up to ``row_slack + 1`` without a partial one.
    epilogue : Epilogue, optional
        Applied before the store.
    dtype : str
        Element type of all tensors.

    Returns
    -------
    tvm.tirx.PrimFunc
        Function of x (N, H, W, C), weight (`packing.pack_convolution_weight`), [bias (O,)],
        [residual (N, Ho, Wo, O)], out (N, Ho, Wo, O); unscheduled blocks ``padded``, and for each
        column part ``sums`` over (n, ho, wo, o, kh, kw, c) and ``epilogue`` over (n, ho, wo, o).
    """
    epilogue = epilogue or Epilogue()
    batch, height, width = int64(batch), int64(height), int64(width)
    out_height, out_width = (
        _as_variable(size, f"out_{name}")
        for name, size in zip(
            ("height", "width"), output_size((height, width), kernel_size, stride, pad), strict=True
        )
    )
    wide = out_width + row_slack if row_slack else out_width
    shape = [batch, out_height, out_width, out_channels]
    with function("convolution") as builder:
        x = argument("x", [batch, height, width, in_channels], dtype)
        weight = argument(
            "weight", [-(-out_channels // tile), *kernel_size, in_channels, tile], dtype
        )
        finish = declare_epilogue(epilogue, shape, dtype, dtype)
        image = pad_image(x, (out_height, wide), kernel_size, stride, pad, dtype)
        for part in column_parts(out_channels, tile):
            sums = compute(
                f"sums{part.suffix}",
                [batch, out_height, wide, part.width],
                lambda b, i, j, n, p, q, c, part=part: (
                    image[b, i * stride[0] + p, j * stride[1] + q, c]
                    * weight[(part.start + n) // tile, p, q, c, (part.start + n) % tile]
                ),
                reduce=[*kernel_size, in_channels],
                dtype=dtype,
            )
            finish.store(
                part.suffix,
                sums,
                [batch, out_height, out_width, part.width],
                lambda b, i, j, n, part=part: [b, i, j, part.start + n],
            )
    return builder.get()


def output_size(
    size: tuple[Any, Any],
    kernel_size: tuple[int, int],
    stride: tuple[int, int],
    pad: tuple[int, int],
) -> tuple[Any, Any]:
    """Return height and width of a convolution's result."""
    height, width = (
        _output_extent(*axis) for axis in zip(size, kernel_size, stride, pad, strict=True)
    )
    return height, width


def _output_extent(size: Any, kernel: int, stride: int, pad: int) -> Any:
    known = static(size)
    if known is not None:
        return int64((known + 2 * pad - kernel) // stride + 1)
    return Analyzer().simplify(tirx.floordiv(size + (2 * pad - kernel), int64(stride)) + 1)


def _as_variable(size: Any, name: str) -> Any:
    """Replace an expression by a variable; see tvm_workarounds: dynamic-extents."""
    return size if isinstance(size, tirx.IntImm | tirx.Var) else tirx.Var(name, "int64")


def pad_image(
    x: Any,
    outputs: tuple[Any, Any],
    kernel_size: tuple[int, int],
    stride: tuple[int, int],
    pad: tuple[int, int],
    dtype: str,
) -> Any:
    """Add the block ``padded``, which copies a channels-last image and zero-pads it.

    Its extents cover the windows of ``outputs`` = (rows, columns); `dtype` is its element type.
    """
    batch, height, width, channels = x.shape
    extents = [(count - 1) * stride[axis] + kernel_size[axis] for axis, count in enumerate(outputs)]

    def pixel(b: Any, i: Any, j: Any, c: Any) -> Any:
        row, column = i - pad[0], j - pad[1]
        inside = tirx.all(row >= 0, row < height, column >= 0, column < width)
        value = cast(dtype, x[b, row, column, c])
        return tirx.if_then_else(inside, value, tirx.const(0, dtype))

    return compute("padded", [batch, *extents, channels], pixel, dtype=dtype)
