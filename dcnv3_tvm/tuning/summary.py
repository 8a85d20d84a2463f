"""Summary of a tuning session, as plain values and as files."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from dcnv3_tvm import files
from dcnv3_tvm.errors import MissingDependencyError
from dcnv3_tvm.schedules.records import Records
from dcnv3_tvm.tuning.plots import plot_progress, plot_shares

if TYPE_CHECKING:
    from dcnv3_tvm.tuning.session import TuningSession

SUMMARY: Final = "summary.json"
_FORMATS: Final = ("png", "svg")


def summarize(session: TuningSession, records: Records) -> dict[str, Any]:
    """Summarize a session.

    Returns
    -------
    dict
        Values that JSON can represent. ``kernels`` lists the kernels by decreasing share of the
        time, each with its share of all calls before and after tuning and the best time after
        each trial (``curve``); ``before`` and ``after`` are the seconds of all calls.
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
        "max_trials": session.budget.trials,
        "seconds": session.seconds,
        "trials_per_minute": session.trials_per_minute,
        "interrupted": session.interrupted,
        "without_schedule": [
            state.task.kernel
            for state in session.states
            if state.default_seconds is None and state.has_tried(state.task.default)
        ],
        "before": before,
        "after": after,
        "kernels": kernels,
    }


def totals_text(
    *, trials: int, max_trials: int, trials_per_minute: float, before: float, after: float
) -> str:
    """Return the totals of a session as text, for its display and its summary alike.

    Parameters
    ----------
    trials, max_trials : int
        Number of trials and its limit.
    trials_per_minute : float
        Rate of trials.
    before, after : float
        Seconds of all kernels with the default and with the best schedules; 0 if unknown.
    """
    text = f"{trials} of {max_trials} trials, {trials_per_minute:.0f} trials/min"
    if not after:
        return text
    return f"{text}, all kernels {1e3 * before:.3f} -> {1e3 * after:.3f} ms ({before / after:.3f}x)"


def write_summary(summary: dict[str, Any], directory: Path) -> list[Path]:
    """Write ``summary.json``, and plots if matplotlib is installed.

    Returns
    -------
    list of Path
        The files written.

    Raises
    ------
    OSError
        If a file cannot be written.
    """
    path = directory / SUMMARY
    with files.atomic_file(path) as temporary:
        temporary.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    written = [path]
    try:
        figures = {"progress": plot_progress(summary), "shares": plot_shares(summary)}
    except MissingDependencyError:
        return written
    for name, figure in figures.items():
        for form in _FORMATS:
            written.append(directory / f"{name}.{form}")
            with files.atomic_file(written[-1]) as temporary:
                figure.savefig(temporary, format=form, dpi=120)
    return written
