"""Outputs for kernels under test: what is not written, or written outside, is seen."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Final

import numpy as np

from dcnv3_tvm.dtypes import numpy_dtype
from dcnv3_tvm.runtime.tensors import to_kernel

_ALIGNMENT: Final = 64
"""Bytes that kernels expect the beginning of an argument to be a multiple of."""

_LEAST_MARGIN: Final = 4096


class GuardedOutput:
    """An array of NaN in the middle of memory that must stay as it is.

    Parameters
    ----------
    shape : sequence of int
        Of the array.
    dtype : str
        Its element type.
    """

    def __init__(self, shape: Sequence[int], dtype: str) -> None:
        kind = numpy_dtype(dtype)
        size = math.prod(shape) * kind.itemsize
        margin = -(-max(size, _LEAST_MARGIN) // _ALIGNMENT) * _ALIGNMENT
        memory = np.zeros(2 * margin + size + _ALIGNMENT, np.uint8)
        start = margin + -memory.ctypes.data % _ALIGNMENT
        self._outside = memory[:start], memory[start + size :]
        self._array = memory[start : start + size].view(kind).reshape(tuple(shape))
        self._array.fill(np.nan)
        self.argument = to_kernel(self._array)
        """What a kernel takes."""

    def checked(self) -> np.ndarray[Any, np.dtype[Any]]:
        """Return the array; fails where memory around it was written to."""
        assert not any(part.any() for part in self._outside), "written outside of the output"
        return self._array
