"""Bar chart of a profile."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Final

from dcnv3_tvm.plotting import new_figure, save_figure
from dcnv3_tvm.runtime.profile import Profile

_BARS: Final = 20
"""Kernels with a bar of their own; the others share one."""


def save_profile_plot(
    found: Profile, rooflines: Sequence[float | None], title: str, path: str | os.PathLike[str]
) -> None:
    """Draw a bar for the time of each kernel, colored by rule, with its roofline as a line.

    Parameters
    ----------
    found : Profile
        The profile.
    rooflines : sequence of float or None
        Lower bound in seconds of the time of each kernel of the profile.
    title : str
        Name of the model.
    path : path
        File to write; its suffix selects the format, such as ``.png`` or ``.svg``.

    Raises
    ------
    MissingDependencyError
        If matplotlib is not installed.
    InvalidArgumentError
        If the file cannot be written.
    """
    bars = [
        (f"{kernel.calls} x {kernel.name}", kernel.rule, kernel.seconds, bound)
        for kernel, bound in zip(found.kernels, rooflines, strict=True)
    ]
    if len(bars) > _BARS:
        rest = sum(seconds for _, _, seconds, _ in bars[_BARS:])
        bars[_BARS:] = [(f"{len(bars) - _BARS} other kernels", "others", rest, None)]
    bars.append(("outside kernels", "others", found.other_seconds, None))
    rules = list(dict.fromkeys(rule for _, rule, _, _ in bars))
    figure = new_figure((9.0, 1.6 + 0.26 * len(bars)), extra="bench")
    axes = figure.subplots()
    for position, (_, rule, seconds, bound) in enumerate(bars):
        color = "0.6" if rule == "others" else f"C{rules.index(rule) % 10}"
        axes.barh(position, 1e3 * seconds, color=color, label=rule)
        axes.text(
            1e3 * seconds, position, f" {100 * seconds / found.seconds:.1f}%", va="center", size=8
        )
        if bound is not None:
            axes.vlines(1e3 * bound, position - 0.4, position + 0.4, color="black", linewidth=1.5)
    axes.set_yticks(range(len(bars)), [label for label, _, _, _ in bars], size=8)
    axes.invert_yaxis()
    axes.margins(x=0.1)
    axes.set_xlabel("milliseconds in a call; black line: roofline")
    axes.set_title(f"{title}: {1e3 * found.seconds:.2f} ms, {found.threads} threads", size="medium")
    handles, labels = axes.get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    figure.legend(unique.values(), unique.keys(), loc="outside right upper", fontsize="small")
    save_figure(figure, path)
