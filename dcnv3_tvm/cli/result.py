"""Result of a subcommand, and tables as text."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any


@dataclasses.dataclass(frozen=True)
class Result:
    """Result of a subcommand.

    Parameters
    ----------
    data : object
        JSON values, printed with ``--json``; None if the subcommand has printed its results.
    text : str
        Text, printed otherwise.
    ok : bool
        Whether the exit code is 0.
    save : callable
        Writes files; called after the results are printed, so that they are not lost if it fails.
    """

    data: Any
    text: str
    ok: bool = True
    save: Callable[[], None] = lambda: None


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Format rows with aligned columns: numbers to the right, text to the left.

    Examples
    --------
    >>> print(table(["name", "size"], [["a", 10], ["bc", 2]]))
    name  size
    a       10
    bc       2
    """
    cells = [list(header), *([str(cell) for cell in row] for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    right = [
        bool(rows) and all(isinstance(row[column], int | float) for row in rows)
        for column in range(len(header))
    ]
    lines = []
    for row in cells:
        aligned = [
            cell.rjust(width) if to_right else cell.ljust(width)
            for cell, width, to_right in zip(row, widths, right, strict=True)
        ]
        lines.append("  ".join(aligned).rstrip())
    return "\n".join(lines)
