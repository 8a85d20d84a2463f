"""Whether an exported program holds for all sizes of the image, or only for some like the example.

A model may take another way for another size (``if height % 32: pad``). ``torch.export`` follows
the one of the example, and notes on what it depended. Nothing of that is left in the graph.
"""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any, Final

import torch
from torch.export import ExportedProgram
from torch.utils._sympy.printers import PythonPrinter

from dcnv3_tvm.errors import ModelImportError

_AXES: Final = "nchw"

_PROBES: Final = (*range(2, 132), 256, 257, 384, 510, 513, 800, 1023, 1333, 4096, 5001)
"""Sizes at which a note is looked at: all remainders of the usual steps, small and large."""

_NAMES: Final = {each.__name__: each for each in (math, torch, min, max, abs, int, float, round)}
"""What the notes call."""


def check_guards(program: ExportedProgram, shape: tuple[int, ...], dynamic: set[int]) -> None:
    """Refuse a program that holds only for some of the sizes that are to be open.

    Notes that some map has more than one pixel are no reason: ``torch.export`` always makes them,
    and what is left in the graph holds for one pixel as well.

    Parameters
    ----------
    program : ExportedProgram
        Of one argument, ``image``.
    shape : tuple of int
        Of the example.
    dynamic : set of int
        Its open axes.

    Raises
    ------
    ModelImportError
        With what the program depends on.
    """
    depends = [
        f"{note} ({place})" if place else note
        for note, place in _notes(program).items()
        if not _holds(note, shape, dynamic)
    ]
    if depends:
        raise ModelImportError(
            "the model computes other things for images of another size",
            got=f"it was exported for sizes where {' and '.join(depends)}",
            hint="Import it with fixed sizes (dynamic_batch=False, dynamic_size=False), or without "
            "the step that depends on the size, for example a padding, and do that outside.",
        )


def _notes(program: ExportedProgram) -> dict[str, str]:
    """Return the conditions on n, c, h and w under which the graph was made, and who set them."""
    image = next(node for node in program.graph.nodes if node.name == "image").meta["val"]
    print_python = PythonPrinter().doprint
    sizes = {
        axis: size.node
        for axis, size in zip(_AXES, image.shape, strict=True)
        if isinstance(size, torch.SymInt)
    }
    axes: dict[str, str] = {}
    notes: dict[str, str] = {}
    for axis, size in sizes.items():
        text = print_python(size.expr)
        if text.isidentifier() and text not in axes:
            axes[text] = axis
        else:  # The sizes of the image depend on each other.
            notes[f"{axis} == {text}"] = ""
    for size in list(sizes.values())[:1]:  # all sizes have the same
        for guard in size.shape_env.guards:
            notes[print_python(guard.expr)] = str(guard.sloc).strip("()")

    def with_axes(note: str) -> str:
        return re.sub(r"\w+", lambda found: axes.get(found[0], found[0]), note)

    return {with_axes(note): place for note, place in notes.items()}


def _holds(note: str, shape: tuple[int, ...], dynamic: set[int]) -> bool:
    tree = ast.parse(note, mode="eval")
    code = compile(tree, note, "eval")
    try:
        return all(
            _value(code, sizes) or _is_single(tree, sizes) for sizes in _probes(shape, dynamic)
        )
    except (NameError, AttributeError, TypeError, ArithmeticError):
        return False  # It speaks of more than sizes, so nobody knows.


def _probes(shape: tuple[int, ...], dynamic: set[int]) -> Iterator[dict[str, int]]:
    example = dict(zip(_AXES, shape, strict=True))
    for axis in sorted(dynamic):
        for size in _PROBES:
            yield example | {_AXES[axis]: size}


def _value(code: Any, sizes: Mapping[str, int]) -> Any:
    """Compute what ``torch.export`` wrote."""
    return eval(code, {"__builtins__": {}, **_NAMES, **sizes})


def _is_single(tree: ast.Expression, sizes: Mapping[str, int]) -> bool:
    """Tell whether a size that a note speaks of is one (or none), of a map for example."""
    for node in ast.walk(tree):
        # A remainder or a ratio of one says nothing of a size; neither does a number.
        if not isinstance(node, ast.BinOp) or isinstance(node.op, (ast.Mod, ast.Div)):
            continue
        depends = any(isinstance(part, ast.Name) for part in ast.walk(node))
        if depends and _value(compile(ast.Expression(node), "", "eval"), sizes) in (0, 1):
            return True
    return False
