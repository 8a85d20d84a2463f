"""Weight layouts of the CPU kernels: output channels in column tiles.

Output channel ``n`` is stored in tile ``n // tile`` at position ``n % tile``, so that the inner
loop of a schedule reads weights in order. The last tile is zero-padded.
"""

from __future__ import annotations

from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

PAIR: Final = 2
"""Input features interleaved in bfloat16 weights, for instructions that multiply and add pairs."""

TILE: Final = 16
"""Rows, columns, and pairs of a matrix tile of AMX."""

BLOCK: Final = 2 * TILE
"""Rows and columns of a block of two tiles by two, and input features of a step."""


class ColumnPart(NamedTuple):
    """A range of output channels with blocks of its own, whose names end in `suffix`."""

    suffix: str
    start: int
    width: int


def column_parts(channels: int, tile: int) -> list[ColumnPart]:
    """Split output channels into whole tiles and up to two narrower ones.

    No store then needs a bounds check. A remainder of more than half a tile is split, because LLVM
    generates slow code for vectors between one and two registers wide, and a tile is two registers.
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


def pack_matmul_weight(weight: npt.NDArray[Any], tile: int) -> npt.NDArray[Any]:
    """Pack a weight matrix for `dcnv3_tvm.kernels.matmul.matmul`.

    Parameters
    ----------
    weight : ndarray of shape (N, K)
        One row an output feature, in the kernel's element type.
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


def pack_tile_weight(weight: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Pack a weight matrix for `dcnv3_tvm.kernels.tile_matmul.tile_matmul`.

    Parameters
    ----------
    weight : ndarray of shape (N, K)
        In bfloat16; N and K are at least `BLOCK`.

    Returns
    -------
    ndarray of shape (ceil(N/32), ceil(K/32), 2, 16, 16, 2)
        Contiguous; axes are block, step, half of the block, pair, column, element of the pair. The
        last block and the last step end at N and K, where those before have the same columns and
        input features; the latter are zero in the last step.
    """
    outputs, inputs = weight.shape
    blocks, steps = -(-outputs // BLOCK), -(-inputs // BLOCK)
    columns = (
        np.minimum(np.arange(blocks) * BLOCK, outputs - BLOCK)[:, None] + np.arange(BLOCK)
    ).ravel()
    padded = np.zeros((blocks * BLOCK, steps * BLOCK), weight.dtype)
    whole = inputs // BLOCK * BLOCK
    padded[:, :whole] = weight[columns, :whole]
    if whole < inputs:
        padded[:, whole - inputs :] = weight[columns, whole:]
    tiles = padded.reshape(blocks, 2, TILE, steps, TILE, PAIR)
    return np.ascontiguousarray(tiles.transpose(0, 3, 1, 4, 2, 5))


def pack_convolution_weight(weight: npt.NDArray[Any], tile: int) -> npt.NDArray[Any]:
    """Pack a weight for `dcnv3_tvm.kernels.convolution.convolution`.

    Parameters
    ----------
    weight : ndarray of shape (O, C, kh, kw)
        In PyTorch's layout.
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
    padded = np.zeros((tiles * tile, *weight.shape[1:]), weight.dtype)
    padded[:channels] = weight
    grouped = padded.reshape(tiles, tile, *weight.shape[1:])
    return np.ascontiguousarray(np.moveaxis(grouped, 1, -1))
