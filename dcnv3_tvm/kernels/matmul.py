"""Matmul with packed weights, its epilogue in the same kernel, for CPUs."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

from tvm import tirx

from dcnv3_tvm.errors import InvalidArgumentError
from dcnv3_tvm.kernels.epilogue import Epilogue, declare_epilogue
from dcnv3_tvm.kernels.packing import PAIR, column_parts
from dcnv3_tvm.op.expr import cast, int64, product, unflatten
from dcnv3_tvm.op.prim_func_builder import argument, compute, function


@functools.lru_cache(maxsize=256)
def matmul(
    lead: Sequence[Any],
    in_features: int,
    out_features: int,
    *,
    tile: int,
    row_slack: int = 0,
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
    row_slack : int
        Rows computed beyond the last, which repeat it and are not stored: a schedule can then use
        row tiles of any height up to ``row_slack + 1`` without a partial one.
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

    def source(row: Any) -> list[Any]:
        return unflatten(tirx.min(row, rows - 1) if row_slack else row, lead)

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
        finish = declare_epilogue(
            epilogue, [*lead, out_features], accumulator, out_dtype or accumulator
        )
        for part in column_parts(out_features, tile):
            sums = compute(
                f"sums{part.suffix}",
                [rows + row_slack if row_slack else rows, part.width],
                lambda m, n, k, part=part: (
                    cast(accumulator, x[(*source(m), k)])
                    * cast(accumulator, element(part.start + n, k))
                ),
                reduce=[in_features],
                dtype=accumulator,
            )
            finish.store(
                part.suffix,
                sums,
                [rows, part.width],
                lambda m, n, part=part: [*unflatten(m, lead), part.start + n],
            )
    return builder.get()


def sum_dtype(dtype: str) -> str:
    """Return the element type in which operands of a type are multiplied and summed."""
    return "float32" if dtype == "bfloat16" else dtype
