"""PTX: where arithmetic in 32 bits overflows on the way to an address in global memory."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from dcnv3_tvm.compiler.cuda.nvcc import run_nvcc
from dcnv3_tvm.runtime.cuda_toolkit import find_nvcc

MOST_BLOCKS: Final = 2**23
"""Thread blocks of the largest launch: with 128 rows each, 2**30 rows."""

_LIMIT: Final = 2**31
_FITS: Final = (0, _LIMIT - 1)
"""Sizes, and what is not analysed."""

_KINDS: Final = (
    *("mov", "cvt", "selp", "add", "sub", "mul", "mad", "shl", "or", "and", "shr"),
    *("rem", "div"),
)
_REGISTERS: Final = {"%ctaid": MOST_BLOCKS, "%tid": 1024, "%ntid": 1024, "%nctaid": MOST_BLOCKS}
_ADDRESS: Final = re.compile(
    r"(?:cp\.async\.c[ag]\.shared\.global \[%r\d+\], "
    r"|(?:ld|st|red)\.global[.\w]*\s+(?:[{%][^\[\n]*, )?)\[(%rd\d+)"
)
_INSTRUCTION: Final = re.compile(r"^\s*(?:@!?%?\w+\s+)?([a-z][\w.]*)\s+(%rd?\d+), (.*);", re.M)
_WIDENS: Final = re.compile(r"(?:cvt\.[su]64\.[su]32|mul\.wide\.[su]32|mad\.wide\.[su]32)$")

Range = tuple[int, int]


def compile_ptx(source: str, arch: str = "sm_90") -> dict[str, Kernel]:
    """Compile CUDA source as for an artifact; return its kernels by name."""
    nvcc = find_nvcc()
    assert nvcc is not None
    with tempfile.TemporaryDirectory() as folder:
        run_nvcc(nvcc, source, arch, Path(folder), ("--keep", f"--keep-dir={folder}"))
        text = (Path(folder) / "kernels.ptx").read_text()
    parts = re.split(r"\.entry (\w+)\(", text)
    return dict(zip(parts[1::2], map(Kernel, parts[2::2]), strict=True))


class Kernel:
    """A kernel in PTX.

    Parameters
    ----------
    text : str
        From the name of the kernel to its end.
    """

    def __init__(self, text: str) -> None:
        self.text = text
        self.addresses = _ADDRESS.findall(text)
        self._defined: dict[str, list[tuple[str, list[str]]]] = {}
        for name, register, rest in _INSTRUCTION.findall(text):
            operands = [each.strip(" []") for each in rest.split(",")]
            self._defined.setdefault(register, []).append((name, operands))
        self._ranges: dict[str, Range] = {}

    def overflows(self) -> list[str]:
        """List the instructions that widen a number to an address after it may have overflowed."""
        found = []
        for address in self.addresses:
            for name, operands in self._widenings(address, set()):
                for operand in operands:
                    low, high = self._range(operand)
                    if low < -_LIMIT or high >= _LIMIT:
                        found.append(f"{name} {', '.join(operands)}: up to {high}")
        return sorted(set(found))

    def _widenings(self, register: str, seen: set[str]) -> Iterator[tuple[str, list[str]]]:
        """Iterate over the instructions through which numbers of 32 bits reach an address."""
        if register in seen:
            return
        seen.add(register)
        for name, operands in self._defined.get(register, []):
            if _WIDENS.match(name):
                yield name, [each for each in operands if re.match(r"%r\d", each)]
            for operand in operands:
                if operand.startswith("%rd"):
                    yield from self._widenings(operand, seen)

    def _range(self, operand: str) -> Range:
        """Bound an operand, as if it had enough bits; of a loop, only in its first pass."""
        if re.match(r"-?\d+$", operand):
            return int(operand), int(operand)
        if operand.partition(".")[0] in _REGISTERS:
            return 0, _REGISTERS[operand.partition(".")[0]] - 1
        if operand not in self._ranges:
            self._ranges[operand] = (0, 0)
            every = [self._result(*each) for each in self._defined.get(operand, [])] or [_FITS]
            self._ranges[operand] = min(low for low, _ in every), max(high for _, high in every)
        return self._ranges[operand]

    def _result(self, name: str, operands: list[str]) -> Range:
        """Bound the result of an instruction; `_FITS` if nothing else is known."""
        kind = name.partition(".")[0]
        if kind not in _KINDS or ".hi" in name:
            return _FITS
        a, *rest = [self._range(each) for each in operands]
        if kind in ("mov", "cvt"):
            return a
        b = rest[0]
        if kind == "selp":
            return min(a[0], b[0]), max(a[1], b[1])
        if kind == "add":
            return a[0] + b[0], a[1] + b[1]
        if kind == "sub":
            return (0, a[1]) if self._is_remainder(*operands) else (a[0] - b[1], a[1] - b[0])
        if kind in ("mul", "mad", "shl"):
            factors = [1 << min(each, 63) for each in b] if kind == "shl" else b
            products = [x * y for x in a for y in factors]
            low, high = rest[1] if kind == "mad" else (0, 0)
            return min(products) + low, max(products) + high
        if min(a[0], b[0]) < 0:
            return _FITS
        if kind == "or":
            return 0, a[1] + b[1]
        if kind in ("and", "rem"):
            return 0, min(a[1], b[1])
        return 0, a[1] >> b[0] if kind == "shr" else a[1] // max(b[0], 1)

    def _is_remainder(self, a: str, b: str) -> bool:
        """Return whether b is a / c * c."""
        return any(
            (quotient, divided[0]) == ("div", a)
            for name, factors in self._defined.get(b, [])
            if name.startswith("mul.lo")
            for factor in factors
            for quotient, divided in (
                (name.partition(".")[0], operands)
                for name, operands in self._defined.get(factor, [])
            )
        )
