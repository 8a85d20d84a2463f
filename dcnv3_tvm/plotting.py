"""Figures of matplotlib, which is an optional dependency."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dcnv3_tvm import files
from dcnv3_tvm.errors import InvalidArgumentError, MissingDependencyError

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def new_figure(size: tuple[float, float], *, extra: str, instead: str = "") -> Figure:
    """Return an empty figure that needs no display.

    Parameters
    ----------
    size : (float, float)
        Width and height in inches.
    extra : str
        Extra of this package that installs matplotlib for the caller.
    instead : str
        A sentence about what works without.

    Raises
    ------
    MissingDependencyError
        If matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingDependencyError(
            "the picture needs matplotlib, which is not installed",
            hint=f'Run: pip install "dcnv3-tvm[{extra}]"' + (f". {instead}" if instead else ""),
        ) from error
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Figure, path: str | os.PathLike[str], **options: Any) -> None:
    """Write a figure to a file, whose suffix selects the format.

    Parameters
    ----------
    figure : Figure
        The figure.
    path : path
        The file; unchanged if anything fails.
    **options
        As of the figure's method `savefig`.

    Raises
    ------
    InvalidArgumentError
        If the file cannot be written.
    """
    path = Path(path)
    try:
        with files.atomic_file(path) as temporary:
            figure.savefig(temporary, **options)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise InvalidArgumentError(
            "the picture cannot be written", got=f"{reason} ({path})"
        ) from error
