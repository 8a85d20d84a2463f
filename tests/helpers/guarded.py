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


class GuardedOutput:
    """An array of NaN, with margins that a kernel must not write to.

    Parameters
    ----------
    shape : sequence of int
        Shape of the array.
    dtype : str
        Dtype of the array.
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
        """The array as a kernel argument."""

    def checked(self) -> np.ndarray[Any, np.dtype[Any]]:
        """Return the array; fails if a margin was written to."""
        assert not any(part.any() for part in self._outside), "the kernel wrote outside its output"
        return self._array
