"""Write small LLVM functions that load, rearrange and combine vectors."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Final

from dcnv3_tvm.dtypes import DTYPE_BYTES

LLVM_TYPES: Final = {"float32": "float", "float64": "double"}
"""LLVM's names of the element types that vectors may have."""


class VectorFunction:
    """An LLVM function that LLVM inlines, under construction.

    TVM would load and rearrange element by element what is not contiguous.

    Parameters
    ----------
    name : str
        Its name.
    pointers : str
        Its arguments, one letter each.
    dtype : str
        Element type of the memory they point to.
    """

    def __init__(self, name: str, pointers: str, dtype: str) -> None:
        self._scalar = LLVM_TYPES[dtype]
        self._bytes = DTYPE_BYTES[dtype]
        self._values = itertools.count()
        arguments = ", ".join(f"ptr %{pointer}" for pointer in pointers)
        self._lines = [f"define i32 @{name}({arguments}) alwaysinline {{"]

    def emit(self, instruction: str) -> str:
        """Add an instruction and return the name of its value."""
        name = f"%v{next(self._values)}"
        self._lines.append(f"  {name} = {instruction}")
        return name

    def load(self, pointer: str, index: int, count: int, lanes: int) -> str:
        """Load `count` elements into a vector of `lanes`, the others of which are undefined."""
        place = self._place(pointer, index)
        value = self.emit(f"load <{count} x {self._scalar}>, ptr {place}, align {self._bytes}")
        if count == lanes:
            return value
        return self.shuffle(value, "poison", count, [*range(count), *[None] * (lanes - count)])

    def store(self, value: str, pointer: str, index: int, count: int, lanes: int) -> None:
        """Store the first `count` elements of a vector of `lanes`."""
        if count < lanes:
            value = self.shuffle(value, "poison", lanes, range(count))
        place = self._place(pointer, index)
        kind = f"<{count} x {self._scalar}>"
        self._lines.append(f"  store {kind} {value}, ptr {place}, align {self._bytes}")

    def _place(self, pointer: str, index: int) -> str:
        return self.emit(f"getelementptr {self._scalar}, ptr %{pointer}, i64 {index}")

    def shuffle(self, first: str, second: str, lanes: int, picked: Sequence[int | None]) -> str:
        """Pick elements of two vectors of `lanes`; None leaves one undefined."""
        kind = f"<{lanes} x {self._scalar}>"
        mask = ", ".join("i32 poison" if lane is None else f"i32 {lane}" for lane in picked)
        indices = f"<{len(picked)} x i32> <{mask}>"
        return self.emit(f"shufflevector {kind} {first}, {kind} {second}, {indices}")

    def calculate(self, operation: str, lanes: int, first: str, second: str) -> str:
        """Apply ``fadd``, ``fsub`` or ``max``; that of a number and NaN is the second."""
        kind = f"<{lanes} x {self._scalar}>"
        if operation != "max":
            return self.emit(f"{operation} {kind} {first}, {second}")
        larger = self.emit(f"fcmp ogt {kind} {first}, {second}")
        return self.emit(f"select <{lanes} x i1> {larger}, {kind} {first}, {kind} {second}")

    def code(self) -> str:
        """Return the function."""
        return "\n".join([*self._lines, "  ret i32 0", "}", ""])
