"""Execute the tutorial and write it as notebooks.

    python examples/make_notebooks.py                             # all of them
    python examples/make_notebooks.py operator_step_by_step.py

A source is a Python file of cells: ``# %% [markdown]`` starts a cell whose text is one string,
``# %%`` starts a cell of code. The notebooks next to the sources hold what the cells printed and
drew; Jupyter can open both. No Jupyter is needed here: the cells are executed in this process.
"""

from __future__ import annotations

import argparse
import ast
import base64
import contextlib
import io
import json
import re
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

import matplotlib.pyplot as plt

FOLDER: Final = Path(__file__).parent
SOURCES: Final = tuple(
    FOLDER / f"{part}_step_by_step.py" for part in ("operator", "encoder", "compiler")
)
DOTS_PER_INCH: Final = 80
METADATA: Final = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


class Cell(NamedTuple):
    """A cell of a notebook; `kind` is "markdown" or "code"."""

    kind: str
    text: str
    line: int


def read_cells(source: Path) -> list[Cell]:
    """Split a source into its cells."""
    cells = []
    line = 1
    for part in re.split(r"^(?=# %%)", source.read_text(encoding="utf-8"), flags=re.MULTILINE):
        mark, _, text = part.partition("\n")
        if mark.startswith("# %%"):
            kind = "markdown" if "[markdown]" in mark else "code"
            text = text.strip("\n")
            content = ast.literal_eval(text).strip("\n") if kind == "markdown" else text
            cells.append(Cell(kind, content, line))
        line += part.count("\n")
    return cells


def execute(source: Path, parameters: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Execute the cells of a source; return them with their outputs, in the format of notebooks.

    Parameters
    ----------
    source : Path
        The source.
    parameters : mapping
        Values for names that the first cell of code assigns.
    """
    names: dict[str, Any] = {"__name__": "__main__"}
    pending = dict(parameters)
    result = []
    count = 0
    for index, cell in enumerate(read_cells(source)):
        written: dict[str, Any] = {
            "id": f"cell-{index}",
            "cell_type": cell.kind,
            "metadata": {},
            "source": cell.text.splitlines(keepends=True),
        }
        if cell.kind == "code":
            count += 1
            with _in_folder(source.parent), _outputs() as outputs:
                # As many empty lines in front as the source has, for the lines of a traceback.
                code = compile("\n" * cell.line + cell.text, str(source), "exec")
                exec(code, names)
            names |= pending
            pending = {}
            written |= {"execution_count": count, "outputs": outputs}
        result.append(written)
    return result


@contextlib.contextmanager
def _in_folder(folder: Path) -> Iterator[None]:
    """Import from the examples first, as Jupyter and Python do that run there."""
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))


@contextlib.contextmanager
def _outputs() -> Iterator[list[dict[str, Any]]]:
    """Collect what is printed and drawn, in order."""
    outputs: list[dict[str, Any]] = []
    text = io.StringIO()

    def take_text() -> None:
        if text.getvalue():
            lines = text.getvalue().splitlines(keepends=True)
            outputs.append({"output_type": "stream", "name": "stdout", "text": lines})
        text.seek(0)
        text.truncate()

    def show() -> None:
        take_text()
        outputs.extend(_picture(plt.figure(number)) for number in plt.get_fignums())
        plt.close("all")

    original, plt.show = plt.show, show
    try:
        with contextlib.redirect_stdout(text):
            yield outputs
    finally:
        plt.show = original
    take_text()


def _picture(figure: plt.Figure) -> dict[str, Any]:
    """Return a figure as an output, with its titles as the alternative text."""
    png = io.BytesIO()
    figure.savefig(png, dpi=DOTS_PER_INCH, bbox_inches="tight", metadata={"Software": None})
    titles = [figure.get_suptitle(), *(axes.get_title() for axes in figure.axes)]
    return {
        "output_type": "display_data",
        "data": {"image/png": base64.b64encode(png.getvalue()).decode()},
        "metadata": {"alt": "; ".join(title.replace("\n", " ") for title in titles if title)},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("source", nargs="*", type=Path, help="sources (default: all)")
    plt.switch_backend("Agg")
    for source in parser.parse_args().source or SOURCES:
        start = time.perf_counter()
        cells = execute(source, {})
        notebook = {"cells": cells, "metadata": METADATA, "nbformat": 4, "nbformat_minor": 5}
        path = source.with_suffix(".ipynb")
        path.write_text(json.dumps(notebook, ensure_ascii=False, indent=1) + "\n", "utf-8")
        seconds = time.perf_counter() - start
        print(f"{path}: {seconds:.0f} s, {path.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
