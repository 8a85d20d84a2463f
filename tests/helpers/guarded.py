"""Output buffers of kernels under test, which detect missing and out-of-bounds writes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Final

import numpy as np

from dcnv3_tvm.dtypes import numpy_dtype
from dcnv3_tvm.runtime.tensors import to_kernel

_ALIGNMENT: Final = 64
"""Alignment in bytes that kernels expect of their arguments."""

_LEAST_MARGIN: Final = 4096


def surrounded(array: np.ndarray[Any, np.dtype[Any]]) -> Any:
    """Return an array as a kernel argument, with NaN before and after it in memory."""
    output = GuardedOutput(array.shape, array.dtype.name, margin=np.nan)
    output.array[...] = array
    return output.argument


class GuardedOutput:
    """An array of NaN, with margins that a kernel must not write to.

    Parameters
    ----------
    shape : sequence of int
        Shape of the array.
    dtype : str
        Dtype of the array.
    margin : float
        Value of the elements around it.
    """

    def __init__(self, shape: Sequence[int], dtype: str, margin: float = 0.0) -> None:
        kind = numpy_dtype(dtype)
        size = math.prod(shape) * kind.itemsize
        around = -(-max(size, _LEAST_MARGIN) // _ALIGNMENT) * _ALIGNMENT
        count = -(-(2 * around + size + _ALIGNMENT) // kind.itemsize)
        memory = np.full(count, margin, kind).view(np.uint8)
        start = around + -memory.ctypes.data % _ALIGNMENT
        self._outside = memory[:start], memory[start + size :]
        self.array = memory[start : start + size].view(kind).reshape(tuple(shape))
        self.array.fill(np.nan)
        self.argument = to_kernel(self.array)
        """The array as a kernel argument."""

    def checked(self) -> np.ndarray[Any, np.dtype[Any]]:
        """Return the array; fails if a margin was written to."""
        assert not any(part.any() for part in self._outside), "the kernel wrote outside its output"
        return self.array
