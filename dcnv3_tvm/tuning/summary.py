"""What a session has found: plain values, and pictures of them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from dcnv3_tvm import files
from dcnv3_tvm.errors import MissingDependencyError
from dcnv3_tvm.schedules.records import Records

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from dcnv3_tvm.tuning.session import Session

SUMMARY: Final = "summary.json"
_FORMATS: Final = ("png", "svg")
_NAMED: Final = 12
"""Kernels that a picture names; the others are drawn together."""


def summarize(session: Session, records: Records) -> dict[str, Any]:
    """Collect what a session has found.

    Returns
    -------
    dict
        Plain values. ``kernels`` lists the kernels, those that take longest first, each with its
        share of the time of all calls before and after, and the shortest time after each trial
        (``curve``); ``before`` and ``after`` are the seconds of all calls.
    """
    kernels: list[dict[str, Any]] = []
    for state in session.states:
        record = records.by_workload.get(state.task.workload)
        if record is not None:
            kernels.append(
                {
                    **dataclasses.asdict(record),
                    "calls": state.task.calls,
                    "space": state.task.size,
                    "failed": state.failed,
                    "curve": state.curve,
                }
            )
    before, after = (
        sum(kernel["calls"] * kernel[time] for kernel in kernels)
        for time in ("default_seconds", "seconds")
    )
    for kernel in kernels:
        kernel["share_before"] = kernel["calls"] * kernel["default_seconds"] / before
        kernel["share_after"] = kernel["calls"] * kernel["seconds"] / after
    kernels.sort(key=lambda kernel: -float(kernel["share_before"]))
    return {
        **dataclasses.asdict(records.about),
        "seconds": round(session.seconds, 1),
        "trials_per_minute": round(session.trials_per_minute, 1),
        "interrupted": session.interrupted,
        "without_schedule": [
            state.task.kernel
            for state in session.states
            if state.default_seconds is None and state.tried(state.task.default)
        ],
        "before": before,
        "after": after,
        "kernels": kernels,
    }


def write_summary(summary: dict[str, Any], directory: Path) -> list[Path]:
    """Write ``summary.json``, and pictures where matplotlib is installed.

    Returns
    -------
    list of Path
        The files.

    Raises
    ------
    OSError
        If they cannot be written.
    """
    path = directory / SUMMARY
    with files.atomic_file(path) as temporary:
        temporary.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    written = [path]
    try:
        figures = {"progress": _progress(summary), "shares": _shares(summary)}
    except MissingDependencyError:
        return written
    for name, figure in figures.items():
        for form in _FORMATS:
            written.append(directory / f"{name}.{form}")
            with files.atomic_file(written[-1]) as temporary:
                figure.savefig(temporary, format=form, dpi=120)
    return written


def _figure() -> Figure:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingDependencyError(
            "matplotlib, which draws pictures, is not installed",
            hint="Run: pip install 'dcnv3-tvm[tune]'",
        ) from error
    figure = Figure(figsize=(11, 6), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _progress(summary: dict[str, Any]) -> Figure:
    """Draw the shortest time of each kernel after each of its trials, by its default's time."""
    figure = _figure()
    axes = figure.subplots()
    for kernel in summary["kernels"][:_NAMED]:
        ratios = [seconds / kernel["default_seconds"] for seconds in kernel["curve"]]
        axes.step(range(1, len(ratios) + 1), ratios, where="post", label=_short(kernel))
    axes.set_xlabel("trials of the kernel")
    axes.set_ylabel("shortest time / time by default")
    axes.set_title(_title(summary))
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize="x-small")
    return figure


def _shares(summary: dict[str, Any]) -> Figure:
    """Draw the time of all calls of each kernel, before and after."""
    figure = _figure()
    axes = figure.subplots()
    bottoms = [0.0, 0.0]
    named, others = summary["kernels"][:_NAMED], summary["kernels"][_NAMED:]
    parts = [(_short(kernel), [kernel]) for kernel in named]
    if others:
        parts.append((f"{len(others)} others", others))
    for index, (label, kernels) in enumerate(parts):
        heights = [
            1e3 * sum(kernel["calls"] * kernel[time] for kernel in kernels)
            for time in ("default_seconds", "seconds")
        ]
        axes.bar(
            ["by default", "tuned"], heights, bottom=bottoms, label=label, color=f"C{index % 10}"
        )
        bottoms = [bottom + height for bottom, height in zip(bottoms, heights, strict=True)]
    axes.set_ylabel("milliseconds of all calls")
    axes.set_title(_title(summary))
    figure.legend(loc="outside right upper", fontsize="x-small", reverse=True)
    return figure


def _title(summary: dict[str, Any]) -> str:
    return (
        f"{summary['target']}: {1e3 * summary['before']:.2f} ms by default, "
        f"{1e3 * summary['after']:.2f} ms tuned, {summary['trials']} trials"
    )


def _short(kernel: dict[str, Any]) -> str:
    text = f"{kernel['calls']} x {kernel['kernel']}"
    return text if len(text) <= 60 else text[:57] + "..."
