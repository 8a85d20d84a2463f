"""Products and convolutions as one matrix product, for GPUs.

A convolution is a product of rows, one an output pixel, by columns, one an output channel, whose
rows are gathered from the image as they are needed (an implicit GEMM). Rows, columns and the depth
that is summed over are filled up with zeros to multiples of what a block of threads computes.

========= ==========================================================================================
block     what it computes
========= ==========================================================================================
operand   the rows, in the type of the product, zero where there is nothing
product   sums over the depth of row times weight, in float32
epilogue  bias, activation and residual, and the one rounding to the output type
store     the copy to the output
========= ==========================================================================================
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from tvm import tirx

from dcnv3_tvm.gpu import FRAGMENT
from dcnv3_tvm.kernels.activations import activate
from dcnv3_tvm.kernels.convolution import output_extent
from dcnv3_tvm.kernels.epilogue import Epilogue
from dcnv3_tvm.op.expr import cast, int64, product, static, unflatten
from dcnv3_tvm.op.prim_func_builder import argument, compute, function

KERNEL: Final = "gemm"
"""Name of these kernels, the value of their attribute `stages.KERNEL_ATTR`."""

SUMS: Final = "float32"
"""Element type of sums, bias and activation, whatever the type of the product."""

DEPTH_UNIT: Final = 32
"""Multiple that a depth is filled up to, unless it is short and a multiple of `FRAGMENT`."""

VECTOR: Final = 8
"""Most elements that are copied at once."""

_SHORT_DEPTH: Final = 128
_ROW_UNITS: Final = (128, 64, 32, 16)
_ROW_WASTE: Final = 1.1


def row_unit(rows: Any) -> int:
    """Return the multiple that a number of rows is filled up to: large, with few rows wasted."""
    known = static(rows)
    if known is None:
        return _ROW_UNITS[0]
    least = round_up(known, _ROW_UNITS[-1])
    return next(unit for unit in _ROW_UNITS if round_up(known, unit) <= _ROW_WASTE * least)


def padded_depth(depth: int) -> int:
    """Return the depth, filled up so that it has a divisor a block can take at a time."""
    return int(round_up(depth, FRAGMENT if depth <= _SHORT_DEPTH else DEPTH_UNIT))


@functools.lru_cache(maxsize=256)
def gemm(
    lead: Sequence[Any],
    in_features: int,
    out_features: int,
    *,
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
    epilogue : Epilogue, optional
        What to apply before the store.
    dtype : str
        Element type of the factors; sums are float32.
    x_dtype, residual_dtype, out_dtype : str, optional
        Other element types for x, residual and out.

    Returns
    -------
    tvm.tirx.PrimFunc
        Function of x (*lead, K), weight (as `pack_gemm_weight` gives it), [bias (N,) in float32],
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
    epilogue: Epilogue | None = None,
    dtype: str,
    x_dtype: str | None = None,
    out_dtype: str | None = None,
) -> tirx.PrimFunc:
    """Build a dense convolution of channels-last tensors, zero-padded.

    Parameters
    ----------
    batch, height, width : int or tirx.Var
        Sizes of x.
    in_channels, out_channels : int
        C and O.
    kernel_size, stride, pad : (int, int)
        (height, width) pairs.
    epilogue : Epilogue, optional
        What to apply before the store.
    dtype : str
        Element type of the factors; sums are float32.
    x_dtype, out_dtype : str, optional
        Other element types for x and out.

    Returns
    -------
    tvm.tirx.PrimFunc
        Function of x (N, H, W, C), weight (as `pack_gemm_weight` gives it), [bias (O,) in float32],
        [residual (N, Ho, Wo, O)], out (N, Ho, Wo, O); unscheduled.
    """
    batch, height, width = int64(batch), int64(height), int64(width)
    places = [
        batch,
        *(
            output_extent(size, kernel_size[axis], stride[axis], pad[axis], 1)
            for axis, size in enumerate((height, width))
        ),
    ]

    vector = math.gcd(in_channels, VECTOR)

    def gather(x: Any, row: Any, k: Any) -> tuple[Any, Any]:
        b, i, j = unflatten(row, places)
        # By whole vectors, so that it is seen that the place is the same for all of a vector.
        whole = tirx.floordiv(k, int64(vector))
        extents = [int64(size) for size in (*kernel_size, in_channels // vector)]
        p, q, c = unflatten(whole, extents)
        y, z = i * stride[0] + p - pad[0], j * stride[1] + q - pad[1]
        inside = tirx.all(y >= 0, y < height, z >= 0, z < width)
        return x[b, y, z, c * vector + tirx.floormod(k, int64(vector))], inside

    return _gemm(
        [batch, height, width, in_channels],
        places,
        kernel_size[0] * kernel_size[1] * in_channels,
        out_channels,
        gather,
        epilogue or Epilogue(),
        (dtype, x_dtype or dtype, dtype, out_dtype or dtype),
    )


def _gemm(
    shape: Sequence[Any],
    lead: Sequence[Any],
    depth: int,
    columns: int,
    gather: Callable[[Any, Any, Any], tuple[Any, Any]],
    epilogue: Epilogue,
    dtypes: tuple[str, str, str, str],
) -> tirx.PrimFunc:
    """Build the kernel; ``gather(x, row, k)`` gives an element, and the condition that it exists.

    `dtypes` are those of the factors, of x, of the residual and of out.
    """
    dtype, x_dtype, residual_dtype, out_dtype = dtypes
    rows = product(lead)
    all_columns, all_depth = round_up(columns, FRAGMENT), padded_depth(depth)
    with function(KERNEL) as builder:
        x = argument("x", shape, x_dtype)
        by_depth = dtype == SUMS
        shape_of_weight = [all_depth, all_columns] if by_depth else [all_columns, all_depth]
        weight = argument("weight", shape_of_weight, dtype)
        bias = argument("bias", [columns], SUMS) if epilogue.bias else None
        out_shape = [*lead, columns]
        residual = argument("residual", out_shape, residual_dtype) if epilogue.residual else None
        out = argument("out", out_shape, out_dtype)
        operand = add_operand(rows, depth, lambda row, k: gather(x, row, k), dtype)
        sums = compute(
            "sums",
            [operand.shape[0], all_columns],
            lambda m, n, k: (
                cast(SUMS, operand[m, k]) * cast(SUMS, weight[(k, n) if by_depth else (n, k)])
            ),
            reduce=[all_depth],
            dtype=SUMS,
        )
        add_store(sums, lead, epilogue.activation, bias, residual, out)
    return builder.get()


def add_operand(
    rows: Any, depth: int, gather: Callable[[Any, Any], tuple[Any, Any]], dtype: str
) -> Any:
    """Add the block ``operand``; ``gather(row, k)`` gives an element, and whether it exists."""
    all_rows, all_depth = round_up(rows, row_unit(rows)), padded_depth(depth)

    def element(row: Any, k: Any) -> Any:
        value, inside = gather(row, k)
        conditions = [] if inside is None else [inside]
        if static(rows) is None or static(rows) != static(all_rows):
            conditions.append(row < rows)
        if all_depth != depth:
            # By whole vectors, so that a vector is read or not read as one.
            vector = math.gcd(depth, VECTOR)
            conditions.append(tirx.floordiv(k, int64(vector)) < depth // vector)
        value = cast(dtype, value)
        if not conditions:
            return value
        return tirx.if_then_else(tirx.all(*conditions), value, tirx.const(0, dtype))

    return compute("operand", [all_rows, all_depth], element, dtype=dtype)


def add_store(
    sums: Any, lead: Sequence[Any], activation: str | None, bias: Any, residual: Any, out: Any
) -> None:
    """Add the blocks ``epilogue`` and ``store``; bias and residual may be None."""
    out_dtype = str(out.dtype)

    def position(m: Any, n: Any) -> list[Any]:
        return [*unflatten(m, lead), n]

    # Rows and columns until the very end: TVM would lose sight of which elements of a tensor
    # of more dimensions a thread has.
    places = [product(lead), out.shape[-1]]

    def value(m: Any, n: Any) -> Any:
        total = sums[m, n] if bias is None else sums[m, n] + bias[n]
        total = activate(activation, total)
        if residual is not None:
            total = total + cast(SUMS, residual[tuple(position(m, n))])
        return cast(out_dtype, total)

    finished = compute("epilogue", places, value, dtype=out_dtype)
    compute("store", places, lambda m, n: finished[m, n], dtype=out_dtype, into=out, at=position)


def pack_gemm_weight(weight: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Fill up a weight for these kernels.

    Parameters
    ----------
    weight : ndarray of shape (N, K) or (O, kh, kw, C)
        In the type of the product.

    Returns
    -------
    ndarray of shape (columns, depth), in float32 (depth, columns)
        Contiguous; zero beyond N and K. Tensor cores take columns whose depth is contiguous,
        threads read neighbouring columns.
    """
    matrix = weight.reshape(weight.shape[0], -1)
    columns, depth = matrix.shape
    packed = np.zeros((round_up(columns, FRAGMENT), padded_depth(depth)), weight.dtype)
    packed[:columns, :depth] = matrix
    return np.ascontiguousarray(packed.T) if weight.dtype == SUMS else packed


def round_up(size: Any, unit: int) -> Any:
    """Return a size, filled up to a multiple of a unit."""
    known = static(size)
    if known is not None:
        return -(-known // unit) * unit
    return tirx.floordiv(size + (unit - 1), int64(unit)) * int64(unit)
