"""Two products with an activation between them in one kernel, for GPUs.

What the first product makes is several times as wide as what goes in and comes out. In one kernel
it never reaches the GPU's memory: a block of threads takes some rows, makes its hidden columns
slab by slab, and multiplies each slab at once. Rows, sums and the last blocks are those of
`dcnv3_tvm.kernels.gemm`.

========= ==========================================================================================
block     what it computes
========= ==========================================================================================
operand   the rows, in the type of the products, zero where there is nothing
inner     sums of the first product, in float32
hidden    its bias and activation, rounded to the type of the products
product   sums of the second product, in float32
epilogue  its bias and residual, and the one rounding to the output type
store     the copy to the output
========= ==========================================================================================
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, Final

from tvm import tirx

from dcnv3_tvm import gpu
from dcnv3_tvm.errors import InvalidArgumentError
from dcnv3_tvm.gpu import FRAGMENT
from dcnv3_tvm.kernels import gemm
from dcnv3_tvm.kernels.activations import activate
from dcnv3_tvm.kernels.gemm import SUMS
from dcnv3_tvm.op.expr import cast, int64, product, unflatten
from dcnv3_tvm.op.prim_func_builder import argument, compute, function

KERNEL: Final = "mlp"
"""Name of these kernels, the value of their attribute `stages.KERNEL_ATTR`."""

SLAB: Final = 32
"""Hidden columns that a block has at a time."""

ROWS: Final = 128
"""Rows of a block."""

WIDEST: Final = 128
"""Most columns that go in and come out.

A warp has 32 rows, so that it reads a weight for two fragments, and keeps their sums: a register of
each thread for a column. The slab, its sums and the factors need some 100 of the 255.
"""


def pays(rows: int | None, inputs: int, hidden: int, outputs: int) -> bool:
    """Whether one kernel takes less time than two.

    It spares the writing and reading of the hidden columns, 4 bytes each in a row. That takes an
    H200 (4.3 TB/s) 0.93 ps, and their ``2 * (inputs + outputs)`` operations (790 TFLOP/s) 0.65 ps
    with 128 columns that go in and come out: two kernels wait for memory, one for arithmetic. From
    184 on arithmetic binds both; but `WIDEST` columns are what the registers suffice for.

    With less than a tile for each multiprocessor two kernels, which have tiles of columns too, use
    more of the GPU.

    Parameters
    ----------
    rows : int or None
        None where they are known only at run time.
    inputs, hidden, outputs : int
        Columns that go in, between, and come out.
    """
    large = rows is None or rows >= gpu.FULL_GPU_BLOCKS * ROWS
    return large and hidden % SLAB == 0 and max(inputs, outputs) <= WIDEST


@functools.lru_cache(maxsize=64)
def mlp(
    lead: Sequence[Any],
    inputs: int,
    hidden: int,
    outputs: int,
    *,
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
        Columns of x, between the products, and of out; `hidden` a multiple of `SLAB`.
    activation : str
        One of `dcnv3_tvm.kernels.activations.ACTIVATIONS`.
    residual : bool
        Whether a tensor of the shape of out is added last.
    dtype : str
        Element type of the factors, float16 or bfloat16; sums are float32.
    x_dtype, residual_dtype, out_dtype : str, optional
        Other element types for x, residual and out.

    Returns
    -------
    tvm.tirx.PrimFunc
        Function of x (*lead, inputs), weight1, bias1 (hidden,) in float32, weight2, bias2
        (outputs,) in float32, [residual (*lead, outputs)], out (*lead, outputs); unscheduled.
        Weights are as `gemm.pack` gives them.

    Raises
    ------
    InvalidArgumentError
        If `hidden` is no multiple of `SLAB`, or the factors are float32.
    """
    if hidden % SLAB or dtype == SUMS:
        raise InvalidArgumentError(
            "the two products cannot be one kernel",
            got=f"{hidden} hidden columns in {dtype}",
            allowed=f"a multiple of {SLAB} in float16 or bfloat16",
        )
    lead = [int64(size) for size in lead]
    with function(KERNEL) as builder:
        x = argument("x", [*lead, inputs], x_dtype or dtype)
        weight1 = argument("weight1", [hidden, gemm.padded_depth(inputs)], dtype)
        bias1 = argument("bias1", [hidden], SUMS)
        columns = gemm.round_up(outputs, FRAGMENT)
        weight2 = argument("weight2", [columns, hidden], dtype)
        bias2 = argument("bias2", [outputs], SUMS)
        shape = [*lead, outputs]
        added = argument("residual", shape, residual_dtype or dtype) if residual else None
        out = argument("out", shape, out_dtype or dtype)

        def element(row: Any, k: Any) -> tuple[Any, None]:
            return x[(*unflatten(row, lead), k)], None

        operand = gemm.add_operand(product(lead), inputs, element, dtype)
        rows, depth = operand.shape
        inner = compute(
            "hidden_sums",
            [rows, hidden],
            lambda m, n, k: cast(SUMS, operand[m, k]) * cast(SUMS, weight1[n, k]),
            reduce=[depth],
            dtype=SUMS,
        )
        between = compute(
            "hidden",
            [rows, hidden],
            lambda m, n: cast(dtype, activate(activation, inner[m, n] + bias1[n])),
            dtype=dtype,
        )
        sums = compute(
            "sums",
            [rows, columns],
            lambda m, n, k: cast(SUMS, between[m, k]) * cast(SUMS, weight2[n, k]),
            reduce=[hidden],
            dtype=SUMS,
        )
        gemm.add_store(sums, lead, None, bias2, added, out)
    return builder.get()
