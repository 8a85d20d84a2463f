"""Matrix products and convolutions, with what follows them computed in the same kernel.

Weights come packed in column tiles, so that the inner loop of a schedule reads them in order:
output channel ``n`` lies in tile ``n // tile`` at position ``n % tile``, and the last tile is
filled up with zeros. In bfloat16 two input features lie side by side, because the processors'
dot product takes pairs. Its operands are multiplied and summed in float32, in which the epilogue
computes too.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt
from tvm import tirx
from tvm.sym import Analyzer

from dcnv3_tvm.errors import InvalidArgumentError
from dcnv3_tvm.kernels.activations import activate
from dcnv3_tvm.kernels.prim_func_builder import argument, compute, function
from dcnv3_tvm.op.expr import cast, int64, product, static, unflatten

PAIR: Final = 2
"""Input features that lie side by side in packed weights of bfloat16."""

ROW_SLACK: Final = 15
"""Rows computed beyond the last, when no row tile divides their number.

They repeat the last row and are thrown away. So every tile of up to ``ROW_SLACK + 1`` rows is
whole, and a schedule needs no slow tail.
"""


@dataclasses.dataclass(frozen=True)
class Epilogue:
    """What a kernel applies to its sums before it stores them, in this order.

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


def needs_slack(rows: Any) -> bool:
    """Whether a number of rows has no divisor that makes a good row tile.

    Parameters
    ----------
    rows : int or expression
        Number of rows; of a symbolic product, only the constant factor counts.
    """
    constant = static(rows)
    if constant is not None and constant <= ROW_SLACK:
        return False
    factor = constant if constant is not None else constant_factor(rows)
    return not any(factor % tile == 0 for tile in range(5, ROW_SLACK + 2))


def constant_factor(extent: Any) -> int:
    """Return the constant among the factors of a product as `stages.product` builds it."""
    if isinstance(extent, tirx.Mul):
        return constant_factor(extent.a) * constant_factor(extent.b)
    return static(extent) or 1


@functools.lru_cache(maxsize=256)
def linear(
    lead: Sequence[Any],
    in_features: int,
    out_features: int,
    *,
    tile: int,
    epilogue: Epilogue | None = None,
    dtype: str = "float32",
    out_dtype: str | None = None,
) -> tirx.PrimFunc:
    """Build ``out = epilogue(x @ weight.T)``.

    Parameters
    ----------
    lead : sequence of int or tirx.Var
        Leading dimensions of x and out.
    in_features, out_features : int
        K and N.
    tile : int
        Columns of a weight tile, see `pack_linear`.
    epilogue : Epilogue, optional
        What to apply before the store.
    dtype : str
        Element type of x and weight. In bfloat16 K must be even.
    out_dtype : str, optional
        Element type of out; by default that of the sums, bias and residual (`sum_dtype`).

    Returns
    -------
    tvm.tirx.PrimFunc
        Function of x (*lead, K), weight (as `pack_linear` gives it), [bias (N,)],
        [residual (*lead, N)], out (*lead, N); unscheduled blocks ``product`` over
        (rows, columns, K) and ``epilogue`` over (rows, columns).
    """
    epilogue = epilogue or Epilogue()
    if dtype == "bfloat16" and in_features % PAIR:
        raise InvalidArgumentError(
            "a product in bfloat16 takes its input features in pairs",
            got=f"{in_features} input features",
            allowed="an even number",
        )
    wide = sum_dtype(dtype)
    lead = [int64(size) for size in lead]
    rows = product(lead)
    slack = needs_slack(rows)

    def source(row: Any) -> list[Any]:
        return unflatten(tirx.min(row, rows - 1) if slack else row, lead)

    def element(column: Any, k: Any) -> Any:
        place = [k, column % tile]
        if dtype == "bfloat16":
            place = [k // PAIR, column % tile, k % PAIR]
        return weight[(column // tile, *place)]

    with function("linear") as builder:
        x = argument("x", [*lead, in_features], dtype)
        pair = [PAIR] if dtype == "bfloat16" else []
        inner = [in_features // math.prod(pair), tile, *pair]
        weight = argument("weight", [-(-out_features // tile), *inner], dtype)
        store = _epilogue_arguments(epilogue, [*lead, out_features], wide, out_dtype or wide)
        for part in column_parts(out_features, tile):
            sums = compute(
                f"product{part.suffix}",
                [rows + ROW_SLACK if slack else rows, part.width],
                lambda m, n, k, part=part: (
                    cast(wide, x[(*source(m), k)]) * cast(wide, element(part.start + n, k))
                ),
                reduce=[in_features],
                dtype=wide,
            )
            store(part, sums, [rows], lambda m: unflatten(m, lead))
    return builder.get()


def sum_dtype(dtype: str) -> str:
    """Return the element type in which operands of a type are multiplied and summed."""
    return "float32" if dtype == "bfloat16" else dtype


class ColumnPart(NamedTuple):
    """A range of output channels with blocks of its own, whose names end in `suffix`."""

    suffix: str
    start: int
    width: int


def column_parts(channels: int, tile: int) -> list[ColumnPart]:
    """Split output channels into whole tiles and up to two narrower ones.

    So no store needs a bounds check. A tile is two vectors, and so is the rest if it is more than
    one: the compiler copes badly with vectors between one and two registers wide.
    """
    rest = channels % tile
    half = tile // 2
    widths = [half, rest - half] if half < rest else [rest] if rest else []
    parts = [ColumnPart("", 0, channels - rest)] if channels > rest else []
    start = channels - rest
    for number, width in enumerate(widths):
        parts.append(ColumnPart(f"_tail{number}", start, width))
        start += width
    return parts


def _epilogue_arguments(
    epilogue: Epilogue, shape: Sequence[Any], dtype: str, out_dtype: str
) -> Callable[[ColumnPart, Any, Sequence[Any], Callable[..., list[Any]]], None]:
    """Declare the parameters of an epilogue, which computes in `dtype`, and the output.

    Returns
    -------
    callable
        ``store(part, sums, places, position)`` adds the epilogue blocks of `part` over `places`;
        ``position(*place)`` is the leading index in the output.
    """
    bias = argument("bias", shape[-1:], dtype) if epilogue.bias else None
    residual = argument("residual", shape, dtype) if epilogue.residual else None
    out = argument("out", shape, out_dtype)

    def value(total: Any, index: Sequence[Any]) -> Any:
        if bias is not None:
            total = total + bias[index[-1]]
        total = activate(epilogue.activation, total)
        return total if residual is None else total + residual[tuple(index)]

    def store(
        part: ColumnPart, sums: Any, places: Sequence[Any], position: Callable[..., list[Any]]
    ) -> None:
        def at(*index: Any) -> list[Any]:
            return [*position(*index[:-1]), part.start + index[-1]]

        compute(
            f"epilogue{part.suffix}",
            [*places, part.width],
            lambda *index: cast(out_dtype, value(sums[index], at(*index))),
            dtype=out_dtype,
            into=out,
            at=at,
        )

    return store


def pack_linear(weight: npt.NDArray[Any], tile: int) -> npt.NDArray[Any]:
    """Pack a weight matrix for `linear`.

    Parameters
    ----------
    weight : ndarray of shape (N, K)
        As PyTorch keeps it: one row an output feature; in the type of the kernel.
    tile : int
        Columns of a tile.

    Returns
    -------
    ndarray of shape (ceil(N/tile), K, tile)
        Contiguous, zero beyond N; in bfloat16 (ceil(N/tile), K/2, tile, 2).
    """
    packed = _pack(weight, tile)
    if weight.dtype.name != "bfloat16":
        return packed
    tiles, inputs, _ = packed.shape
    pairs = packed.reshape(tiles, inputs // PAIR, PAIR, tile)
    return np.ascontiguousarray(np.moveaxis(pairs, 2, 3))


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
    dilation: tuple[int, int] = (1, 1),
    tile: int,
    epilogue: Epilogue | None = None,
    dtype: str = "float32",
) -> tirx.PrimFunc:
    """Build a dense convolution of channels-last tensors, zero-padded.

    Parameters
    ----------
    batch, height, width : int or tirx.Var
        Sizes of x.
    in_channels, out_channels : int
        C and O.
    kernel_size, stride, pad, dilation : (int, int)
        (height, width) pairs.
    tile : int
        Output channels of a weight tile, see `pack_convolution`.
    epilogue : Epilogue, optional
        What to apply before the store.
    dtype : str
        Element type of all tensors.

    Returns
    -------
    tvm.tirx.PrimFunc
        Function of x (N, H, W, C), weight (ceil(O/tile), kh, kw, C, tile), [bias (O,)],
        [residual (N, Ho, Wo, O)], out (N, Ho, Wo, O); unscheduled blocks ``padded``,
        ``product`` over (n, ho, wo, o, kh, kw, c) and ``epilogue`` over (n, ho, wo, o).
    """
    epilogue = epilogue or Epilogue()
    batch, height, width = int64(batch), int64(height), int64(width)
    out_height, out_width = (
        output_extent(size, kernel_size[axis], stride[axis], pad[axis], dilation[axis])
        for axis, size in enumerate((height, width))
    )
    wide = out_width + ROW_SLACK if needs_slack(out_width) else out_width
    shape = [batch, out_height, out_width, out_channels]
    with function("convolution") as builder:
        x = argument("x", [batch, height, width, in_channels], dtype)
        weight = argument(
            "weight", [-(-out_channels // tile), *kernel_size, in_channels, tile], dtype
        )
        store = _epilogue_arguments(epilogue, shape, dtype, dtype)
        image = padded(x, (out_height, wide), kernel_size, stride, pad, dilation, dtype)
        for part in column_parts(out_channels, tile):
            sums = compute(
                f"product{part.suffix}",
                [batch, out_height, wide, part.width],
                lambda b, i, j, n, p, q, c, part=part: (
                    image[b, i * stride[0] + p * dilation[0], j * stride[1] + q * dilation[1], c]
                    * weight[(part.start + n) // tile, p, q, c, (part.start + n) % tile]
                ),
                reduce=[*kernel_size, in_channels],
                dtype=dtype,
            )
            store(part, sums, [batch, out_height, out_width], lambda *place: list(place))
    return builder.get()


def output_extent(size: Any, kernel: int, stride: int, pad: int, dilation: int) -> Any:
    """Return the output size of a convolution along one axis."""
    span = dilation * (kernel - 1) + 1
    known = static(size)
    if known is not None:
        return int64((known + 2 * pad - span) // stride + 1)
    return Analyzer().simplify(tirx.floordiv(size + (2 * pad - span), int64(stride)) + 1)


def padded(
    x: Any,
    outputs: tuple[Any, Any],
    kernel_size: tuple[int, int],
    stride: tuple[int, int],
    pad: tuple[int, int],
    dilation: tuple[int, int],
    dtype: str,
) -> Any:
    """Add a block that copies a channels-last image into a frame of zeros.

    The frame is as large as the windows of ``outputs`` = (rows, columns) reach; `dtype` is its
    element type.
    """
    batch, height, width, channels = x.shape
    extents = [
        (count - 1) * stride[axis] + (dilation[axis] * (kernel_size[axis] - 1) + 1)
        for axis, count in enumerate(outputs)
    ]

    def pixel(b: Any, i: Any, j: Any, c: Any) -> Any:
        row, column = i - pad[0], j - pad[1]
        inside = tirx.all(row >= 0, row < height, column >= 0, column < width)
        value = cast(dtype, x[b, row, column, c])
        return tirx.if_then_else(inside, value, tirx.const(0, dtype))

    return compute("padded", [batch, *extents, channels], pixel, dtype=dtype)


def pack_convolution(weight: npt.NDArray[Any], tile: int) -> npt.NDArray[Any]:
    """Pack the weight of a convolution for `convolution`.

    Parameters
    ----------
    weight : ndarray of shape (O, C, kh, kw)
        As PyTorch keeps it.
    tile : int
        Output channels of a tile.

    Returns
    -------
    ndarray of shape (ceil(O/tile), kh, kw, C, tile)
        Contiguous, zero beyond O.
    """
    return _pack(weight.transpose(0, 2, 3, 1), tile)


def _pack(weight: npt.NDArray[Any], tile: int) -> npt.NDArray[Any]:
    """Move the first axis, in tiles, to the end: (N, ...) to (ceil(N/tile), ..., tile)."""
    channels = weight.shape[0]
    tiles = -(-channels // tile)
    filled = np.zeros((tiles * tile, *weight.shape[1:]), weight.dtype)
    filled[:channels] = weight
    grouped = filled.reshape(tiles, tile, *weight.shape[1:])
    return np.ascontiguousarray(np.moveaxis(grouped, 1, -1))
