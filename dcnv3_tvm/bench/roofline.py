"""Roofline: lower bounds of a kernel's time from its bytes and operations.

Every input and weight is read once, every output written once, at the memory bandwidth; operations
run at the peak rate of their dtype.
"""

from __future__ import annotations

import dataclasses
from typing import Final

from dcnv3_tvm.dtypes import DTYPE_BYTES

CPU_RATES: Final = {"float32": 1.0, "bfloat16": 2.0}
"""Matmul rates of a CPU by dtype, relative to the float32 rate that is measured.

A bfloat16 dot-product instruction does two multiply-adds per float32 lane; the rate of matrix tiles
is measured instead (`Peaks.half_flops`). The roofline of a whole
bfloat16 encoder uses this rate for all operations, and so remains a lower bound.
"""


@dataclasses.dataclass(frozen=True)
class Peaks:
    """Peak rates of a CPU, with some number of threads, or of a GPU.

    Parameters
    ----------
    flops : float
        Float32 operations per second; a multiply-add counts as two.
    bytes : float
        Bytes per second of a copy larger than the caches, reads and writes.
    how : str
        Source of the rates.
    half_flops : float, optional
        Operations per second of 16-bit matmuls on a GPU's tensor cores or in a CPU's matrix tiles.
    """

    flops: float
    bytes: float
    how: str
    half_flops: float | None = None

    def flops_in(self, dtype: str) -> float:
        """Return the rate of matmuls in `dtype`."""
        if self.half_flops is not None and DTYPE_BYTES[dtype] == 2:
            return self.half_flops
        return CPU_RATES[dtype] * self.flops


@dataclasses.dataclass(frozen=True)
class Roofline:
    """Lower bounds of a time in seconds.

    Parameters
    ----------
    memory : float
        Time to read all inputs and weights once and write all outputs once.
    arithmetic : float
        Time of the operations.
    """

    memory: float
    arithmetic: float

    @classmethod
    def of(cls, flops: float, traffic: float, peaks: Peaks, dtype: str = "float32") -> Roofline:
        """Divide operations and bytes (`traffic`) by the peak rates for matmuls in `dtype`."""
        return cls(memory=traffic / peaks.bytes, arithmetic=flops / peaks.flops_in(dtype))

    @property
    def seconds(self) -> float:
        """The larger of the two: memory transfers and arithmetic overlap."""
        return max(self.memory, self.arithmetic)
