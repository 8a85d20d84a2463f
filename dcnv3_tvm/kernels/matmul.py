"""Matmul with packed weights, its epilogue in the same kernel, for CPUs."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, Final

from tvm import tirx

from dcnv3_tvm.errors import InvalidArgumentError
from dcnv3_tvm.kernels.epilogue import Epilogue, declare_epilogue
from dcnv3_tvm.kernels.packing import PAIR, column_parts
from dcnv3_tvm.op.expr import cast, int64, product, static, unflatten
from dcnv3_tvm.op.prim_func_builder import argument, compute, function

ROW_SLACK: Final = 15
"""Rows computed beyond the last, when no row tile divides their number.

They repeat the last row and are thrown away. So every tile of up to ``ROW_SLACK + 1`` rows is
whole, and a schedule needs no slow tail.
"""


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
def matmul(
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
        Columns of a weight tile.
    epilogue : Epilogue, optional
        Applied before the store.
    dtype : str
        Element type of x and weight. In bfloat16 K must be even, and sums are float32.
    out_dtype : str, optional
        Element type of out; by default that of the sums, bias and residual (`sum_dtype`).

    Returns
    -------
    tvm.tirx.PrimFunc
        Function of x (*lead, K), weight (`packing.pack_matmul_weight`), [bias (N,)],
        [residual (*lead, N)], out (*lead, N); unscheduled blocks ``sums`` over
        (rows, columns, K) and ``epilogue`` over (rows, columns), for each column part.

    Raises
    ------
    InvalidArgumentError
        If the type is bfloat16 and K is odd.
    """
    epilogue = epilogue or Epilogue()
    if dtype == "bfloat16" and in_features % PAIR:
        raise InvalidArgumentError(
            "a bfloat16 matmul takes its input features in pairs",
            got=f"{in_features} input features",
            allowed="an even number",
        )
    accumulator = sum_dtype(dtype)
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

    with function("matmul") as builder:
        x = argument("x", [*lead, in_features], dtype)
        pair = [PAIR] if dtype == "bfloat16" else []
        inner = [in_features // math.prod(pair), tile, *pair]
        weight = argument("weight", [-(-out_features // tile), *inner], dtype)
        store = declare_epilogue(
            epilogue, [*lead, out_features], accumulator, out_dtype or accumulator
        )
        for part in column_parts(out_features, tile):
            sums = compute(
                f"sums{part.suffix}",
                [rows + ROW_SLACK if slack else rows, part.width],
                lambda m, n, k, part=part: (
                    cast(accumulator, x[(*source(m), k)])
                    * cast(accumulator, element(part.start + n, k))
                ),
                reduce=[in_features],
                dtype=accumulator,
            )
            store(part, sums, [rows], lambda m: unflatten(m, lead))
    return builder.get()


def sum_dtype(dtype: str) -> str:
    """Return the element type in which operands of a type are multiplied and summed."""
    return "float32" if dtype == "bfloat16" else dtype
