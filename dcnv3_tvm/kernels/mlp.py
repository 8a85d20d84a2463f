"""Two matmuls with an activation between them in one kernel, for GPUs.

The hidden layer, several times as wide as input and output, never reaches the GPU's memory: a
schedule computes some hidden columns of its rows, multiplies them by the second weight at once, and
goes on with the next. Rows, sums and the last blocks are those of `dcnv3_tvm.kernels.gemm`.

=========== ========================================================================================
block       what it computes
=========== ========================================================================================
operand     the rows in the element type of the weights, zero in the padding
hidden_sums sums of the first matmul, in float32
hidden      their bias and activation, rounded to the operands' type
sums        sums of the second matmul, in float32
epilogue    their bias and residual, and the rounding to the output type
store       the copy to the output
=========== ========================================================================================
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, Final

from tvm import tirx

from dcnv3_tvm.errors import InvalidArgumentError
from dcnv3_tvm.kernels.activations import activate
from dcnv3_tvm.kernels.gemm import (
    ACCUMULATOR,
    GemmPadding,
    add_operand,
    add_store,
    count_rows,
    round_up,
)
from dcnv3_tvm.op.expr import cast, int64, unflatten
from dcnv3_tvm.op.prim_func_builder import argument, compute, function

KERNEL: Final = "mlp"
"""Value of `dcnv3_tvm.op.expr.KERNEL_ATTR` of these kernels."""


@functools.lru_cache(maxsize=64)
def mlp(
    lead: Sequence[Any],
    inputs: int,
    hidden: int,
    outputs: int,
    *,
    padding: GemmPadding,
    activation: str,
    residual: bool,
    dtype: str,
    x_dtype: str | None = None,
    residual_dtype: str | None = None,
    out_dtype: str | None = None,
) -> tirx.PrimFunc:
    """Build ``out = activation(x @ weight1.T + bias1) @ weight2.T + bias2 [+ residual]``.

    Parameters
    ----------
    lead : sequence of int or tirx.Var
        Leading dimensions of x and out.
    inputs, hidden, outputs : int
        Features of x, of the hidden layer, and of out.
    padding : GemmPadding
        Of rows, inputs (as depth) and outputs (as columns). The hidden features, which are columns
        and depth, need a multiple of both.
    activation : str
        One of `dcnv3_tvm.kernels.activations.ACTIVATIONS`.
    residual : bool
        Whether a tensor of the shape of out is added last.
    dtype : str
        Element type of the operands, float16 or bfloat16; sums are float32.
    x_dtype, residual_dtype, out_dtype : str, optional
        Other element types for x, residual and out.

    Returns
    -------
    tvm.tirx.PrimFunc
        Function of x (*lead, inputs), weight1, bias1 (hidden,) in float32, weight2, bias2
        (outputs,) in float32, [residual (*lead, outputs)], out (*lead, outputs); unscheduled.
        Weights are packed by `gemm.pack_gemm_weight`.

    Raises
    ------
    InvalidArgumentError
        If the hidden features need padding, or the operands are float32.
    """
    if hidden % padding.columns or hidden % padding.depth or dtype == ACCUMULATOR:
        raise InvalidArgumentError(
            "the two matmuls cannot be one kernel",
            got=f"{hidden} hidden features in {dtype}",
            allowed=f"a multiple of {padding.columns} and {padding.depth} in float16 or bfloat16",
        )
    lead = [int64(size) for size in lead]
    with function(KERNEL) as builder:
        x = argument("x", [*lead, inputs], x_dtype or dtype)
        weight1 = argument("weight1", [hidden, round_up(inputs, padding.depth)], dtype)
        bias1 = argument("bias1", [hidden], ACCUMULATOR)
        columns = round_up(outputs, padding.columns)
        weight2 = argument("weight2", [columns, hidden], dtype)
        bias2 = argument("bias2", [outputs], ACCUMULATOR)
        shape = [*lead, outputs]
        added = argument("residual", shape, residual_dtype or dtype) if residual else None
        out = argument("out", shape, out_dtype or dtype)

        def element(row: Any, k: Any) -> tuple[Any, None]:
            return x[(*unflatten(row, lead), k)], None

        operand = add_operand(count_rows(lead), inputs, padding, element, dtype)
        rows, depth = operand.shape
        hidden_sums = compute(
            "hidden_sums",
            [rows, hidden],
            lambda m, n, k: cast(ACCUMULATOR, operand[m, k]) * cast(ACCUMULATOR, weight1[n, k]),
            reduce=[depth],
            dtype=ACCUMULATOR,
        )
        activated = compute(
            "hidden",
            [rows, hidden],
            lambda m, n: cast(dtype, activate(activation, hidden_sums[m, n] + bias1[n])),
            dtype=dtype,
        )
        sums = compute(
            "sums",
            [rows, columns],
            lambda m, n, k: cast(ACCUMULATOR, activated[m, k]) * cast(ACCUMULATOR, weight2[n, k]),
            reduce=[hidden],
            dtype=ACCUMULATOR,
        )
        add_store(sums, lead, None, bias2, added, out)
    return builder.get()
