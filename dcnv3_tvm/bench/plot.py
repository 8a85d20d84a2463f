"""Bar chart of a report."""

from __future__ import annotations

import os
from typing import Final

from dcnv3_tvm.bench.report import CaseResult, Report
from dcnv3_tvm.errors import InvalidArgumentError
from dcnv3_tvm.plotting import new_figure, save_figure

_WIDTH: Final = 9.0
_BAR: Final = 0.32


def save_plot(report: Report, path: str | os.PathLike[str]) -> None:
    """Draw one group of bars per case on a logarithmic axis, with the roofline as lines.

    Parameters
    ----------
    report : Report
        The report; backends without times are left out.
    path : path
        File to write; its suffix selects the format, such as ``.png`` or ``.svg``.

    Raises
    ------
    MissingDependencyError
        If matplotlib is not installed.
    InvalidArgumentError
        If the file cannot be written, or no backend was timed.
    """
    cases = [case for case in report.cases if _timed(case)]
    if not cases:
        raise InvalidArgumentError("nothing to plot: no backend was timed")
    names = list(dict.fromkeys(name for case in cases for name in _timed(case)))
    lines = sum(len(_timed(case)) + 1 for case in cases)
    figure = new_figure((_WIDTH, 1.8 + _BAR * lines), extra="bench")
    from matplotlib.patches import Patch

    axes = figure.subplots()
    position, ticks = 0.0, []
    for case in cases:
        begin = position
        for name, (lower, median, upper) in _timed(case).items():
            color = f"C{names.index(name) % 10}"
            spread = [[median - lower], [upper - median]]
            axes.barh(position, median, height=0.85, color=color, xerr=spread, ecolor="0.3")
            axes.text(upper, position, f" {median:.3g}", va="center", fontsize="small")
            position += 1
        for seconds, style in ((case.roofline.memory, ":"), (case.roofline.arithmetic, "--")):
            axes.vlines(1e3 * seconds, begin - 0.5, position - 0.5, color="0.2", linestyle=style)
        ticks.append((begin + position - 1) / 2)
        position += 1
    axes.set_yticks(ticks, [case.slug for case in cases], fontsize="small")
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.margins(x=0.12)
    axes.set_xlabel(
        "milliseconds, median and quartiles (log); roofline: memory dotted, arithmetic dashed"
    )
    handles = [Patch(color=f"C{index % 10}") for index in range(len(names))]
    figure.legend(handles, names, loc="outside lower center", ncols=3, fontsize="small")
    machine = report.provenance
    title = f"{machine.cpu}, {machine.threads} threads, {machine.date[:10]}"
    axes.set_title(title, fontsize="medium")
    save_figure(figure, path)


def _timed(case: CaseResult) -> dict[str, tuple[float, float, float]]:
    """Return lower quartile, median and upper quartile in milliseconds by backend."""
    return {
        row.name: (1e3 * row.seconds.lower, 1e3 * row.seconds.median, 1e3 * row.seconds.upper)
        for row in case.rows
        if row.seconds is not None
    }
