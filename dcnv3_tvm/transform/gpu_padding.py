"""How GEMMs are padded on GPUs, and which pairs of matmuls become one kernel."""

from __future__ import annotations

from typing import Any, Final

from dcnv3_tvm import gpu
from dcnv3_tvm.gpu import FRAGMENT, HIDDEN_SLAB
from dcnv3_tvm.kernels.gemm import GemmPadding, round_up
from dcnv3_tvm.op.expr import static

_ROW_MULTIPLES: Final = (128, 64, 32, 16)
_MAX_ROW_WASTE: Final = 1.1

_SHORT_DEPTH: Final = 128
"""Up to this depth, padding to more than one fragment costs too much."""

_VECTOR: Final = gpu.VECTOR_BYTES // 2
"""Elements of float16 and bfloat16 that a thread copies at once."""

_MAX_MLP_WIDTH: Final = 128
"""Most input and output features of a fused MLP.

Two fragments of rows for each warp, so that it reads a weight for 32 rows, keep a register of sums
in each thread for each output column. The hidden slab, its sums and the operands need some 100 of
the 255.
"""


def gemm_padding(rows: Any, depth: int) -> GemmPadding:
    """Choose the padding of a GEMM: a large row multiple that adds few rows.

    Parameters
    ----------
    rows : int or expression
        Rows; an expression where they are known only at run time.
    depth : int
        Summed elements of an output.
    """
    known = static(rows)
    row_multiple = _ROW_MULTIPLES[0]
    if known is not None:
        least = round_up(known, _ROW_MULTIPLES[-1])
        row_multiple = next(
            multiple
            for multiple in _ROW_MULTIPLES
            if round_up(known, multiple) <= _MAX_ROW_WASTE * least
        )
    return GemmPadding(row_multiple, FRAGMENT, depth_multiple(depth), _VECTOR)


def depth_multiple(depth: int) -> int:
    """Return the multiple to pad a depth to: two fragments, a step of the schedule, or one."""
    return FRAGMENT if depth <= _SHORT_DEPTH else 2 * FRAGMENT


def fuses_mlp(rows: int | None, inputs: int, hidden: int, outputs: int) -> bool:
    """Whether one kernel for two matmuls takes less time than two.

    It saves writing and reading the hidden features, 4 bytes each for every row. With 128 inputs
    and outputs that takes an H200 (4.3 TB/s) 0.93 ps, and their ``2 * (inputs + outputs)``
    operations (790 TFLOP/s) 0.65 ps: two kernels are bound by memory, one by arithmetic. From 184
    on arithmetic binds both; registers limit the kernel to 128.

    With fewer row tiles than multiprocessors, two kernels, which have column tiles too, use more of
    the GPU.

    Parameters
    ----------
    rows : int or None
        None where they are known only at run time.
    inputs, hidden, outputs : int
        Features of the input, the hidden layer and the output.
    """
    fills_gpu = rows is None or rows >= gpu.FULL_GPU_BLOCKS * _ROW_MULTIPLES[0]
    return fills_gpu and hidden % HIDDEN_SLAB == 0 and max(inputs, outputs) <= _MAX_MLP_WIDTH
