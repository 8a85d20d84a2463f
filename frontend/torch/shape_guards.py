"""Check the shape guards of an exported program: the conditions on sizes that it depends on.

A model may branch on the image size (``if height % 32: pad``). ``torch.export`` follows the branch
of the example and records the condition as a guard; the graph itself does not contain it.
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

_SIZE_NAMES: Final = "nchw"

_TESTED_SIZES: Final = (*range(2, 132), 256, 257, 384, 510, 513, 800, 1023, 1333, 4096, 5001)
"""Sizes for which guards are evaluated: all remainders of common strides, small and large."""

_NAMESPACE: Final = {
    each.__name__: each for each in (math, torch, min, max, abs, int, float, round)
}
"""Names that PyTorch uses in printed guards."""


def check_shape_guards(
    program: ExportedProgram, shape: tuple[int, ...], dynamic_axes: set[int]
) -> None:
    """Raise an error for a program that is valid only for some of the dynamic sizes.

    Guards that exclude only a size of one are accepted: ``torch.export`` always adds them, and the
    operators left in the graph are valid for one as well.

    Parameters
    ----------
    program : ExportedProgram
        A program with one argument, ``image``.
    shape : tuple of int
        Shape of the example.
    dynamic_axes : set of int
        Axes whose size is dynamic.

    Raises
    ------
    ModelImportError
        If a guard fails for some size; the message names the guard and its source line.
    """
    failing = [
        f"{guard} ({source})" if source else guard
        for guard, source in _guards(program).items()
        if not _always_holds(guard, shape, dynamic_axes)
    ]
    if failing:
        raise ModelImportError(
            "the model computes something else for images of another size",
            got=f"it was exported for sizes where {' and '.join(failing)}",
            hint="Import it with fixed sizes (dynamic_batch=False, dynamic_size=False), or move "
            "the step that depends on the size (for example a padding) out of the model.",
        )


def _guards(program: ExportedProgram) -> dict[str, str]:
    """Return the guards as Python expressions of n, c, h and w, with their source lines."""
    image = next(node for node in program.graph.nodes if node.name == "image").meta["val"]
    print_python = PythonPrinter().doprint
    sizes = {
        name: size.node
        for name, size in zip(_SIZE_NAMES, image.shape, strict=True)
        if isinstance(size, torch.SymInt)
    }
    names: dict[str, str] = {}
    guards: dict[str, str] = {}
    for name, size in sizes.items():
        symbol = print_python(size.expr)
        if symbol.isidentifier() and symbol not in names:
            names[symbol] = name
        else:  # torch.export concluded that one size depends on another.
            guards[f"{name} == {symbol}"] = ""
    for size in list(sizes.values())[:1]:  # All sizes share one list of guards.
        for guard in size.shape_env.guards:
            guards[print_python(guard.expr)] = str(guard.sloc).strip("()")

    def renamed(guard: str) -> str:
        return re.sub(r"\w+", lambda found: names.get(found[0], found[0]), guard)

    return {renamed(guard): source for guard, source in guards.items()}


def _always_holds(guard: str, shape: tuple[int, ...], dynamic_axes: set[int]) -> bool:
    tree = ast.parse(guard, mode="eval")
    code = compile(tree, guard, "eval")
    try:
        return all(
            _evaluate(code, sizes) or _has_size_of_one(tree, sizes)
            for sizes in _tested_sizes(shape, dynamic_axes)
        )
    except (NameError, AttributeError, TypeError, ArithmeticError):
        return False  # The guard depends on more than sizes.


def _tested_sizes(shape: tuple[int, ...], dynamic_axes: set[int]) -> Iterator[dict[str, int]]:
    """Yield the example's sizes with one dynamic size changed at a time."""
    example = dict(zip(_SIZE_NAMES, shape, strict=True))
    for axis in sorted(dynamic_axes):
        for size in _TESTED_SIZES:
            yield example | {_SIZE_NAMES[axis]: size}


def _evaluate(code: Any, sizes: Mapping[str, int]) -> Any:
    return eval(code, {"__builtins__": {}, **_NAMESPACE, **sizes})


def _has_size_of_one(tree: ast.Expression, sizes: Mapping[str, int]) -> bool:
    """Whether a computed size in a guard is one (or zero), for example that of a feature map."""
    for node in ast.walk(tree):
        # A remainder or a ratio is not a size.
        if not isinstance(node, ast.BinOp) or isinstance(node.op, (ast.Mod, ast.Div)):
            continue
        depends = any(isinstance(part, ast.Name) for part in ast.walk(node))
        if depends and _evaluate(compile(ast.Expression(node), "", "eval"), sizes) in (0, 1):
            return True
    return False
