"""Dense convolution in blocks of sums, its epilogue in the same kernel, for CPUs with AMX.

A GEMM: a row is an output pixel, and a row of its window is a run along the depth, which lies in
order in the padded image. Where few pixels of an output row would leave most of a tile empty, the
windows are copied, so that tiles go on in the next output row. See `dcnv3_tvm.kernels.tile_matmul`
for the blocks.
"""

from __future__ import annotations

import functools
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt
from tvm import tirx

from dcnv3_tvm.dtypes import DTYPE_BYTES
from dcnv3_tvm.errors import InvalidArgumentError
from dcnv3_tvm.kernels.convolution import output_size
from dcnv3_tvm.kernels.epilogue import DeclaredEpilogue, Epilogue, declare_epilogue
from dcnv3_tvm.kernels.packing import BLOCK, PAIR, TILE, pack_tile_weight
from dcnv3_tvm.kernels.tile_matmul import (
    ACCUMULATOR,
    OPERAND,
    BlockOperands,
    add_blocks,
    block_rows,
    block_start,
    count_blocks,
    has_many_weights,
    supports_tiles,
)
from dcnv3_tvm.op.expr import cast, int64, product, static, unflatten
from dcnv3_tvm.op.prim_func_builder import argument, compute, function

_BITS: Final = "uint16"
"""Element type of the padded image: the bits of bfloat16, which TVM would store as float32."""

KERNEL: Final = "tile_convolution"
"""Value of `dcnv3_tvm.op.expr.KERNEL_ATTR` of these kernels."""


@functools.lru_cache(maxsize=256)
def tile_convolution(
    batch: Any,
    height: Any,
    width: Any,
    in_channels: int,
    out_channels: int,
    *,
    kernel_size: tuple[int, int],
    stride: tuple[int, int],
    pad: tuple[int, int],
    epilogue: Epilogue | None = None,
    out_dtype: str = ACCUMULATOR,
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
    epilogue : Epilogue, optional
        Applied before the store.
    out_dtype : str
        Element type of out, float32 or bfloat16; other tensors are float32.

    Returns
    -------
    tvm.tirx.PrimFunc
        Function of x (N, H, W, C), weight (`pack_tile_convolution_weight`), [bias (O,)],
        [residual (N, Ho, Wo, O)], out (N, Ho, Wo, O); unscheduled blocks ``padded`` and those of
        `dcnv3_tvm.kernels.tile_matmul.add_blocks`.

    Raises
    ------
    InvalidArgumentError
        If O, or the elements of a row of the window, are fewer than those of a block.
    """
    depth = kernel_size[1] * in_channels
    if not supports_tiles(depth, out_channels):
        raise InvalidArgumentError(
            "the convolution is smaller than a block",
            got=f"{depth} elements in a row of the window, and {out_channels} output channels",
            allowed=f"at least {BLOCK}",
        )
    batch, height, width = int64(batch), int64(height), int64(width)
    out_height, out_width = output_size((height, width), kernel_size, stride, pad)
    with function(KERNEL) as builder:
        x = argument("x", [batch, height, width, in_channels], ACCUMULATOR)
        weight = argument(
            "weight",
            [
                int64(-(-out_channels // BLOCK)),
                kernel_size[0],
                -(-depth // BLOCK),
                2,
                TILE,
                TILE,
                PAIR,
            ],
            OPERAND,
        )
        finish = declare_epilogue(
            epilogue or Epilogue(),
            [batch, out_height, out_width, out_channels],
            ACCUMULATOR,
            out_dtype,
        )
        window = _Window(kernel_size, stride, pad)
        # Windows of less than half a tile's pixels in a row, and of whole steps, are copied. Those
        # of a dynamic number are, if copying takes little next to multiplying many weights.
        width = static(out_width)
        if width is None:
            narrow = has_many_weights(kernel_size[0] * depth, out_channels)
        else:
            narrow = 2 * width <= TILE
        copied = narrow and depth % BLOCK == 0
        add = _add_copied_windows if copied else _add_lines
        add(x, weight, window, finish)
    return builder.get()


class _Window(NamedTuple):
    """(height, width) pairs of a convolution."""

    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    pad: tuple[int, int]


def _add_lines(x: Any, weight: Any, window: _Window, finish: DeclaredEpilogue) -> None:
    """Add blocks of two output rows if these are short, otherwise of one, or of parts of one."""
    batch, _, _, channels = x.shape
    _, out_height, out_width, out_channels = finish.out.shape
    kernel_size, stride, _ = window
    lines = 2 if (static(out_width) or BLOCK) <= TILE and (static(out_height) or 0) > 1 else 1
    columns = out_width if lines == 2 else block_rows(out_width)
    tile = columns if lines == 2 else (columns + 1) // 2
    second = columns if lines == 2 else columns - tile
    grid = [batch, count_blocks(out_height, int64(lines)), count_blocks(out_width, columns)]

    def first(m: Any) -> tuple[Any, Any, Any]:
        """Return the image, row and column of a block's first pixel."""
        b, i, j = unflatten(m, grid)
        return b, block_start(i, int64(lines), out_height), block_start(j, columns, out_width)

    def at(m: Any, n: Any, i: Any, j: Any) -> list[Any]:
        b, row, column = first(m)
        down, along = (tirx.floordiv(i, columns), tirx.floormod(i, columns))
        pixel = [b, row + down, column + along] if lines == 2 else [b, row, column + i]
        return [*pixel, block_start(n, BLOCK, out_channels) + j]

    def position(m: Any) -> tuple[Any, ...]:
        b, row, column = first(m)
        return b, row * stride[0], column * stride[1], 0

    height, width = (
        (count - 1) * stride[axis] + kernel_size[axis]
        for axis, count in enumerate((out_height, out_width))
    )
    image = compute(
        "padded",
        [batch, height, width, channels],
        functools.partial(_padded, x, window.pad),
        dtype=_BITS,
    )
    pixel_bytes = channels * DTYPE_BYTES[OPERAND]
    row_bytes = stride[1] * pixel_bytes
    line_bytes = width * pixel_bytes
    add_blocks(
        [product(grid), weight.shape[0]],
        lines * columns,
        BlockOperands(
            image,
            position,
            weight,
            row_bytes=row_bytes,
            skip_bytes=stride[0] * line_bytes if lines == 2 else second * row_bytes,
            depth=int(kernel_size[1] * channels),
            tile_rows=tile,
            second=second,
            runs=kernel_size[0],
            pitch_bytes=line_bytes,
        ),
        finish,
        at,
    )


def _add_copied_windows(x: Any, weight: Any, window: _Window, finish: DeclaredEpilogue) -> None:
    """Add blocks of output pixels in order, whose windows are copied."""
    channels = x.shape[-1]
    *pixels, out_channels = finish.out.shape
    kernel_size, stride, _ = window
    rows = product(pixels)
    height = block_rows(rows)
    tile = (height + 1) // 2

    def element(b: Any, i: Any, j: Any, down: Any, along: Any, c: Any) -> Any:
        return _padded(x, window.pad, b, i * stride[0] + down, j * stride[1] + along, c)

    copied = compute("padded", [*pixels, *kernel_size, channels], element, dtype=_BITS)
    run_bytes = int(kernel_size[1] * channels) * DTYPE_BYTES[OPERAND]
    row_bytes = kernel_size[0] * run_bytes
    add_blocks(
        [count_blocks(rows, height), weight.shape[0]],
        height,
        BlockOperands(
            copied,
            lambda m: (*unflatten(block_start(m, height, rows), pixels), 0, 0, 0),
            weight,
            row_bytes=row_bytes,
            skip_bytes=(height - tile) * row_bytes,
            depth=int(kernel_size[1] * channels),
            tile_rows=tile,
            second=height - tile,
            runs=kernel_size[0],
            pitch_bytes=run_bytes,
        ),
        finish,
        lambda m, n, i, j: [
            *unflatten(block_start(m, height, rows) + i, pixels),
            block_start(n, BLOCK, out_channels) + j,
        ],
    )


def _padded(x: Any, pad: tuple[int, int], b: Any, i: Any, j: Any, c: Any) -> Any:
    """Return the bits of an element of the zero-padded image, rounded to bfloat16."""
    row, column = i - pad[0], j - pad[1]
    inside = tirx.all(row >= 0, row < x.shape[1], column >= 0, column < x.shape[2])
    bits = tirx.reinterpret("uint32", x[b, row, column, c])
    odd = tirx.bitwise_and(tirx.shift_right(bits, _uint32(16)), _uint32(1))
    rounded = tirx.shift_right(bits + odd + _uint32(0x7FFF), _uint32(16))
    return tirx.if_then_else(inside, cast(_BITS, rounded), tirx.const(0, _BITS))


def _uint32(value: int) -> Any:
    return tirx.const(value, "uint32")


def pack_tile_convolution_weight(weight: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Pack a weight for `tile_convolution`.

    Parameters
    ----------
    weight : ndarray of shape (O, kh, kw, C)
        In bfloat16.

    Returns
    -------
    ndarray of shape (ceil(O/32), kh, ceil(kw*C/32), 2, 16, 16, 2)
        Each row of the window as `pack_tile_weight` packs a matrix.
    """
    rows = weight.reshape(*weight.shape[:2], -1)
    return np.stack([pack_tile_weight(rows[:, row]) for row in range(rows.shape[1])], axis=1)
