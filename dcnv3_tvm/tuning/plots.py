"""Plots of a tuning session's summary."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from dcnv3_tvm.plotting import new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_LABELLED: Final = 12
"""Kernels with a label of their own; the others are drawn together."""

_LABEL_LENGTH: Final = 60
_SIZE: Final = (11.0, 6.0)


def plot_progress(summary: dict[str, Any]) -> Figure:
    """Plot the best time of each kernel after each of its trials, relative to the default.

    Raises
    ------
    MissingDependencyError
        If matplotlib is not installed.
    """
    figure = new_figure(_SIZE, extra="tune")
    axes = figure.subplots()
    for kernel in summary["kernels"][:_LABELLED]:
        ratios = [seconds / kernel["default_seconds"] for seconds in kernel["curve"]]
        axes.step(range(1, len(ratios) + 1), ratios, where="post", label=_label(kernel))
    axes.set_xlabel("trials of the kernel")
    axes.set_ylabel("best time / default time")
    axes.set_title(_title(summary))
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize="x-small")
    return figure


def plot_shares(summary: dict[str, Any]) -> Figure:
    """Plot the time of all calls of each kernel, before and after tuning.

    Raises
    ------
    MissingDependencyError
        If matplotlib is not installed.
    """
    figure = new_figure(_SIZE, extra="tune")
    axes = figure.subplots()
    bottoms = [0.0, 0.0]
    labelled, others = summary["kernels"][:_LABELLED], summary["kernels"][_LABELLED:]
    parts = [(_label(kernel), [kernel]) for kernel in labelled]
    if others:
        parts.append((f"{len(others)} others", others))
    for index, (label, kernels) in enumerate(parts):
        heights = [
            1e3 * sum(kernel["calls"] * kernel[time] for kernel in kernels)
            for time in ("default_seconds", "seconds")
        ]
        axes.bar(["default", "tuned"], heights, bottom=bottoms, label=label, color=f"C{index % 10}")
        bottoms = [bottom + height for bottom, height in zip(bottoms, heights, strict=True)]
    axes.set_ylabel("time of all calls (ms)")
    axes.set_title(_title(summary))
    figure.legend(loc="outside right upper", fontsize="x-small", reverse=True)
    return figure


def _title(summary: dict[str, Any]) -> str:
    return (
        f"{summary['target']}: {1e3 * summary['before']:.3f} -> {1e3 * summary['after']:.3f} ms, "
        f"{summary['trials']} trials"
    )


def _label(kernel: dict[str, Any]) -> str:
    text = f"{kernel['calls']} x {kernel['kernel']}"
    return text if len(text) <= _LABEL_LENGTH else text[: _LABEL_LENGTH - 3] + "..."
