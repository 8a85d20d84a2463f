"""Innermost loops of AArch64 assembly, and what they are made of."""

from __future__ import annotations

import collections
import re
from collections.abc import Iterator
from typing import NamedTuple

_BRANCHES = re.compile(r"(b|b\.\w+|cbn?z|tbn?z)$")
_VECTOR_ADD = re.compile(r"fml[as]|bfdot")


class Loop(NamedTuple):
    """An innermost loop.

    Parameters
    ----------
    vector, by_lane, scalar : int
        Multiply-adds of vectors, those of them that take a factor from a lane, and of scalars.
    loads, spills : int
        Vectors that are loaded, and stored to the stack. A pair counts as two.
    instructions : int
        All instructions.
    """

    vector: int
    by_lane: int
    scalar: int
    loads: int
    spills: int
    instructions: int


def inner_loops(assembly: str) -> list[Loop]:
    """Return the innermost loops of all functions that multiply and add floating-point numbers."""
    loops = (_counted(body) for body in _bodies(_instructions(assembly)))
    return [loop for loop in loops if loop.vector or loop.scalar]


def _instructions(assembly: str) -> list[tuple[str, str]]:
    """Return the mnemonics and operands, and ``("", label)`` for a label."""
    found = []
    for line in assembly.splitlines():
        label = re.match(r"([.\w$]+):", line)
        if label:
            found.append(("", label[1]))
        elif re.match(r"\t[a-z]", line):
            name, _, operands = line.strip().partition("\t")
            found.append((name, operands))
    return found


def _bodies(instructions: list[tuple[str, str]]) -> Iterator[list[tuple[str, str]]]:
    """Yield the instructions from a label to a branch back to it, without a loop in between."""
    places = {operands: place for place, (name, operands) in enumerate(instructions) if not name}
    spans = set()
    for place, (name, operands) in enumerate(instructions):
        start = places.get(operands.split(",")[-1].strip(), place + 1)
        if _BRANCHES.match(name) and start <= place:
            spans.add((start, place))
    for start, end in sorted(spans):
        if not any((start, end) != (a, b) and start <= a and b <= end for a, b in spans):
            yield instructions[start : end + 1]


def _counted(body: list[tuple[str, str]]) -> Loop:
    count: collections.Counter[str] = collections.Counter()
    for name, operands in body:
        size = 2 if name in ("ldp", "stp") else 1
        vector = operands.startswith("q")
        count["instructions"] += bool(name)
        count["vector"] += bool(_VECTOR_ADD.match(name))
        count["by_lane"] += bool(_VECTOR_ADD.match(name)) and operands.endswith("]")
        count["scalar"] += bool(re.match(r"fn?m(add|sub)", name))
        count["loads"] += size * (name.startswith("ld") and vector)
        count["spills"] += size * (name.startswith("st") and vector and "[sp" in operands)
    return Loop(**{field: count[field] for field in Loop._fields})
