"""Matmul and convolution as one GEMM, for GPUs.

A convolution is an implicit GEMM: a row for each output pixel, gathered from the image as it is
read, and a column for each output channel. Rows, columns and depth are zero-padded to multiples of
what a schedule computes at a time.

========= ==========================================================================================
block     what it computes
========= ==========================================================================================
operand   the rows in the element type of the weights, zero in the padding
sums      sums over the depth of row times weight, in float32
epilogue  bias, activation and residual, and the rounding to the output type
store     the copy to the output
========= ==========================================================================================
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt
from tvm import tirx

from dcnv3_tvm.kernels.activations import activate
from dcnv3_tvm.kernels.convolution import output_size
from dcnv3_tvm.kernels.epilogue import Epilogue
from dcnv3_tvm.op.expr import cast, int64, product, static, unflatten
from dcnv3_tvm.op.prim_func_builder import argument, compute, function

KERNEL: Final = "gemm"
"""Value of `dcnv3_tvm.op.expr.KERNEL_ATTR` of these kernels."""

ACCUMULATOR: Final = "float32"
"""Element type of sums, bias and activation, whatever the operands'."""


class GemmPadding(NamedTuple):
    """How a GEMM is padded and read.

    Parameters
    ----------
    rows, columns, depth : int
        Multiples to which the extents are padded.
    vector : int
        Most neighbouring elements along the depth that are copied at once: they are gathered from
        one pixel, and are all inside or all outside of the padding.
    """

    rows: int
    columns: int
    depth: int
    vector: int


@functools.lru_cache(maxsize=256)
def gemm(
    lead: Sequence[Any],
    in_features: int,
    out_features: int,
    *,
    padding: GemmPadding,
    epilogue: Epilogue | None = None,
    dtype: str,
    x_dtype: str | None = None,
    residual_dtype: str | None = None,
    out_dtype: str | None = None,
) -> tirx.PrimFunc:
    """Build ``out = epilogue(x @ weight.T)``.

    Parameters
    ----------
    lead : sequence of int or tirx.Var
        Leading dimensions of x and out.
    in_features, out_features : int
        K and N.
    padding : GemmPadding
        Of rows, columns and depth.
    epilogue : Epilogue, optional
        Applied before the store.
    dtype : str
        Element type of the operands; sums are float32.
    x_dtype, residual_dtype, out_dtype : str, optional
        Other element types for x, residual and out.

    Returns
    -------
    tvm.tirx.PrimFunc
        Function of x (*lead, K), weight (`pack_gemm_weight`), [bias (N,) in float32],
        [residual (*lead, N)], out (*lead, N); unscheduled.
    """
    lead = [int64(size) for size in lead]

    def gather(x: Any, row: Any, k: Any) -> tuple[Any, Any]:
        return x[(*unflatten(row, lead), k)], None

    return _gemm(
        [*lead, in_features],
        lead,
        in_features,
        out_features,
        padding,
        gather,
        epilogue or Epilogue(),
        (dtype, x_dtype or dtype, residual_dtype or dtype, out_dtype or dtype),
    )


@functools.lru_cache(maxsize=256)
def implicit_gemm(
    batch: Any,
    height: Any,
    width: Any,
    in_channels: int,
    out_channels: int,
    *,
    kernel_size: tuple[int, int],
    stride: tuple[int, int],
    pad: tuple[int, int],
    padding: GemmPadding,
    epilogue: Epilogue | None = None,
    dtype: str,
    x_dtype: str | None = None,
    out_dtype: str | None = None,
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
    padding : GemmPadding
        Of the GEMM's rows, columns and depth.
    epilogue : Epilogue, optional
        Applied before the store.
    dtype : str
        Element type of the operands; sums are float32.
    x_dtype, out_dtype : str, optional
        Other element types for x and out.

    Returns
    -------
    tvm.tirx.PrimFunc
        Function of x (N, H, W, C), weight (`pack_gemm_weight`), [bias (O,) in float32],
        [residual (N, Ho, Wo, O)], out (N, Ho, Wo, O); unscheduled.
    """
    batch, height, width = int64(batch), int64(height), int64(width)
    pixels = [batch, *output_size((height, width), kernel_size, stride, pad)]
    vector = math.gcd(in_channels, padding.vector)

    def gather(x: Any, row: Any, k: Any) -> tuple[Any, Any]:
        b, i, j = unflatten(row, pixels)
        # Indices of whole vectors: TVM then sees that a vector comes from one pixel.
        whole = tirx.floordiv(k, int64(vector))
        extents = [int64(size) for size in (*kernel_size, in_channels // vector)]
        p, q, c = unflatten(whole, extents)
        y, z = i * stride[0] + p - pad[0], j * stride[1] + q - pad[1]
        inside = tirx.all(y >= 0, y < height, z >= 0, z < width)
        return x[b, y, z, c * vector + tirx.floormod(k, int64(vector))], inside

    return _gemm(
        [batch, height, width, in_channels],
        pixels,
        kernel_size[0] * kernel_size[1] * in_channels,
        out_channels,
        padding,
        gather,
        epilogue or Epilogue(),
        (dtype, x_dtype or dtype, dtype, out_dtype or dtype),
    )


def _gemm(
    shape: Sequence[Any],
    lead: Sequence[Any],
    depth: int,
    columns: int,
    padding: GemmPadding,
    gather: Callable[[Any, Any, Any], tuple[Any, Any]],
    epilogue: Epilogue,
    dtypes: tuple[str, str, str, str],
) -> tirx.PrimFunc:
    """Build the kernel; ``gather(x, row, k)`` returns an element and the condition for reading it.

    `dtypes` are those of the operands, of x, of the residual and of out.
    """
    dtype, x_dtype, residual_dtype, out_dtype = dtypes
    padded_columns = round_up(columns, padding.columns)
    padded_depth = round_up(depth, padding.depth)
    with function(KERNEL) as builder:
        x = argument("x", shape, x_dtype)
        by_depth = dtype == ACCUMULATOR
        weight_shape = [padded_columns, padded_depth]
        weight = argument("weight", weight_shape[::-1] if by_depth else weight_shape, dtype)
        bias = argument("bias", [columns], ACCUMULATOR) if epilogue.bias else None
        out_shape = [*lead, columns]
        residual = argument("residual", out_shape, residual_dtype) if epilogue.residual else None
        out = argument("out", out_shape, out_dtype)
        operand = add_operand(
            count_rows(lead), depth, padding, lambda row, k: gather(x, row, k), dtype
        )
        sums = compute(
            "sums",
            [operand.shape[0], padded_columns],
            lambda m, n, k: (
                cast(ACCUMULATOR, operand[m, k])
                * cast(ACCUMULATOR, weight[(k, n) if by_depth else (n, k)])
            ),
            reduce=[padded_depth],
            dtype=ACCUMULATOR,
        )
        add_store(sums, lead, epilogue.activation, bias, residual, out)
    return builder.get()


def count_rows(lead: Sequence[Any]) -> Any:
    """Return the number of rows, all of whose sizes are at least one.

    A dynamic number is hidden in a maximum with one. TVM would reduce the fraction of rows and rows
    of a tile by their common divisor, and could no longer prove that the tiles cover the rows.
    """
    rows = product(lead)
    return rows if static(rows) is not None else tirx.max(rows, int64(1))


def add_operand(
    rows: Any,
    depth: int,
    padding: GemmPadding,
    gather: Callable[[Any, Any], tuple[Any, Any]],
    dtype: str,
) -> Any:
    """Add the block ``operand``; ``gather(row, k)`` returns an element and its condition."""
    padded_rows, padded_depth = round_up(rows, padding.rows), round_up(depth, padding.depth)

    def element(row: Any, k: Any) -> Any:
        value, inside = gather(row, k)
        conditions = [] if inside is None else [inside]
        if static(rows) is None or static(rows) != static(padded_rows):
            conditions.append(row < rows)
        if padded_depth != depth:
            # In indices of whole vectors, so that a vector is read or not read as one.
            vector = math.gcd(depth, padding.vector)
            conditions.append(tirx.floordiv(k, int64(vector)) < depth // vector)
        value = cast(dtype, value)
        if not conditions:
            return value
        return tirx.if_then_else(tirx.all(*conditions), value, tirx.const(0, dtype))

    return compute("operand", [padded_rows, padded_depth], element, dtype=dtype)


def add_store(
    sums: Any, lead: Sequence[Any], activation: str | None, bias: Any, residual: Any, out: Any
) -> None:
    """Add the blocks ``epilogue`` and ``store``; bias and residual may be None."""
    out_dtype = str(out.dtype)

    def position(m: Any, n: Any) -> list[Any]:
        return [*unflatten(m, lead), n]

    # Both loop over rows and columns: from indices of more dimensions TVM does not see which
    # elements belong to a thread.
    extents = [count_rows(lead), out.shape[-1]]

    def value(m: Any, n: Any) -> Any:
        total = sums[m, n] if bias is None else sums[m, n] + bias[n]
        total = activate(activation, total)
        if residual is not None:
            total = total + cast(ACCUMULATOR, residual[tuple(position(m, n))])
        return cast(out_dtype, total)

    finished = compute("epilogue", extents, value, dtype=out_dtype)
    compute("store", extents, lambda m, n: finished[m, n], dtype=out_dtype, into=out, at=position)


def pack_gemm_weight(weight: npt.NDArray[Any], padded: Sequence[int]) -> npt.NDArray[Any]:
    """Pad a weight for these kernels.

    Parameters
    ----------
    weight : ndarray of shape (N, K) or (O, kh, kw, C)
        In the element type of the operands.
    padded : (int, int)
        Shape of the result, which does not depend on the rows: kernels for several image sizes
        share their weights.

    Returns
    -------
    ndarray of shape (columns, depth), in float32 (depth, columns)
        Contiguous; zero beyond N and K. Tensor cores read columns along the depth; kernels in
        float32 run without them, and their threads read neighbouring columns.
    """
    matrix = weight.reshape(weight.shape[0], -1)
    if weight.dtype == ACCUMULATOR:
        matrix = matrix.T
    packed = np.zeros(tuple(padded), weight.dtype)
    packed[: matrix.shape[0], : matrix.shape[1]] = matrix
    return packed


def round_up(size: Any, multiple: int) -> Any:
    """Round a size up to a multiple."""
    known = static(size)
    if known is not None:
        return -(-known // multiple) * multiple
    return tirx.floordiv(size + (multiple - 1), int64(multiple)) * int64(multiple)
