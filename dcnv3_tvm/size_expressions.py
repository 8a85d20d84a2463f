"""Sizes that are computed from others, as text such as ``"(h + 1) // 2"``."""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Mapping
from typing import Final

_OPERATIONS: Final[Mapping[type[ast.operator], Callable[[int, int], int]]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
}


def evaluate_size(size: int | str, values: Mapping[str, int]) -> int:
    """Compute a size.

    Parameters
    ----------
    size : int or str
        A number, or an expression of names, numbers, parentheses, ``+``, ``-``, ``*`` and ``//``.
    values : mapping of str to int
        The names' values.

    Raises
    ------
    ValueError
        If it is no such expression, or has an unknown name.

    Examples
    --------
    >>> evaluate_size("(h + 1) // 2", {"h": 7})
    4
    """
    if isinstance(size, int):
        return size
    try:
        return _evaluate(ast.parse(size, mode="eval").body, values)
    except (SyntaxError, KeyError, ZeroDivisionError, RecursionError) as error:
        raise ValueError(f"{size!r} is not a size computed from {', '.join(values)}") from error


def _evaluate(node: ast.expr, values: Mapping[str, int]) -> int:
    if isinstance(node, ast.Constant) and type(node.value) is int:
        return node.value
    if isinstance(node, ast.Name):
        return values[node.id]
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_evaluate(node.operand, values)
    if isinstance(node, ast.BinOp):
        operation = _OPERATIONS[type(node.op)]
        return operation(_evaluate(node.left, values), _evaluate(node.right, values))
    raise KeyError(type(node).__name__)
