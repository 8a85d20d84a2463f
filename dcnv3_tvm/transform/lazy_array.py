"""Arrays that are computed when they are written, so that a model's weights are held once."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


class LazyArray:
    """An array given as a function of others; `numpy.asarray` computes it and keeps nothing.

    Parameters
    ----------
    function : callable
        Takes the computed sources, then `options`. Recognised by identity, so not a lambda.
    sources : tuple of LazyArray or ndarray
        Must not change.
    shape : tuple of int, optional
        Shape of the result; by default that of the first source.
    dtype : dtype, optional
        Element type that the result is converted to; by default that of the first source.
    **options
        Further keyword arguments of `function`.
    """

    def __init__(
        self,
        function: Callable[..., Array],
        *sources: LazyArray | Array,
        shape: Sequence[int] | None = None,
        dtype: npt.DTypeLike | None = None,
        **options: Any,
    ) -> None:
        self._function = function
        self._sources = sources
        self._options = options
        self.shape: tuple[int, ...] = tuple(sources[0].shape if shape is None else shape)
        self.dtype: np.dtype[Any] = np.dtype(sources[0].dtype if dtype is None else dtype)

    @classmethod
    def of(cls, array: LazyArray | Array) -> LazyArray:
        """Wrap an array; return a lazy array as it is."""
        return array if isinstance(array, LazyArray) else cls(np.asarray, array)

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the computed array."""
        return self.size * self.dtype.itemsize

    def __array__(self, dtype: npt.DTypeLike | None = None, copy: bool | None = None) -> Array:
        """Compute the array, contiguous in memory."""
        sources = [np.asarray(source) for source in self._sources]
        array = np.asarray(self._function(*sources, **self._options), self.dtype, order="C")
        if array.shape != self.shape:
            raise AssertionError(f"computed shape {array.shape}, declared {self.shape}")
        return array if dtype is None else array.astype(dtype, copy=False)

    def same(self, other: LazyArray) -> bool:
        """Whether both are computed in the same way from equal arrays."""
        if self is other:
            return True
        alike = (
            self._function is other._function
            and (self.shape, self.dtype) == (other.shape, other.dtype)
            and self._options == other._options
            and len(self._sources) == len(other._sources)
        )
        return alike and all(map(_same, self._sources, other._sources))

    def astype(self, dtype: npt.DTypeLike) -> LazyArray:
        """Convert the elements."""
        return LazyArray(np.asarray, self, dtype=dtype)

    def reshape(self, *shape: int) -> LazyArray:
        """Change the shape, given without a -1."""
        return LazyArray(_reshape, self, shape=shape, to=shape)

    def transpose(self, *axes: int) -> LazyArray:
        """Permute the axes; without arguments, reverse them."""
        order = axes or tuple(reversed(range(self.ndim)))
        shape = [self.shape[axis] for axis in order]
        return LazyArray(np.transpose, self, shape=shape, axes=order)


def _same(first: LazyArray | Array, second: LazyArray | Array) -> bool:
    if isinstance(first, LazyArray) and isinstance(second, LazyArray):
        return first.same(second)
    if isinstance(first, LazyArray) or isinstance(second, LazyArray):
        return False
    return first is second or (first.dtype == second.dtype and np.array_equal(first, second))


def _reshape(array: Array, to: tuple[int, ...]) -> Array:
    return array.reshape(to)
