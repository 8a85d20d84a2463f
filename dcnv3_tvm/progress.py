"""Progress of a long job on stderr."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Final, TextIO

_NARROW: Final = 70
"""Columns of a terminal below which the bar and the name of the job are left out."""


class Progress:
    """Show the current step of a job, the seconds since it started, and the time left.

    On a terminal a bar of `rich <https://rich.readthedocs.io>`_ shows them, in color unless the
    environment variable ``NO_COLOR`` is set; elsewhere, with ``TERM=dumb``, and without rich, each
    step is a line.

    Parameters
    ----------
    title : str
        Name of the job, printed with its total time at the end.
    steps : mapping of str to float, optional
        Steps in their order, and how long they usually take, relative to each other. With it, the
        time left is estimated.
    stream : text stream, optional
        Standard error by default.
    quiet : bool
        Print nothing but what `note` is given.

    Examples
    --------
    >>> with Progress("compile", quiet=True) as progress:
    ...     progress.step("schedule")
    """

    def __init__(
        self,
        title: str,
        *,
        steps: Mapping[str, float] | None = None,
        stream: TextIO | None = None,
        quiet: bool = False,
    ) -> None:
        self._title = title
        self._steps = {} if steps is None else dict(steps)
        self._stream = sys.stderr if stream is None else stream
        self._quiet = quiet
        self._start = time.monotonic()
        self._counted = 0.0
        self._step_start = 0.0
        self._before = 0.0
        self._bar = None if quiet or not self._stream.isatty() else self._start_bar()

    def step(self, name: str) -> None:
        """Start a step."""
        self._step_start = self.seconds
        names = list(self._steps)
        if name in self._steps:
            self._before = sum(self._steps[earlier] for earlier in names[: names.index(name)])
        self._show(name)

    def count(self, done: int, total: int) -> None:
        """Show how many items are done, their rate and the time left, at most every few seconds."""
        seconds = self.seconds
        interval = 5.0 if self._bar is None else 0.2
        if done == 0 or (done < total and seconds - self._counted < interval):
            return
        self._counted = seconds
        self._steps, self._before = {"": float(total)}, float(done)
        self._step_start = seconds
        left = "" if self._bar is not None else f", {(total - done) * seconds / done:.0f} s left"
        self._show(f"{done} of {total}, {done / max(seconds, 1e-9):.1f}/s{left}")

    def note(self, text: str) -> None:
        """Show a message, also if the progress is not shown."""
        with contextlib.suppress(OSError):
            if self._bar is None:
                self._stream.write(f"{text}\n")
                self._stream.flush()
            else:
                options = {"markup": False, "highlight": False, "emoji": False}
                self._bar.console.print(text, soft_wrap=True, **options)

    @property
    def seconds(self) -> float:
        """Seconds since the job started."""
        return time.monotonic() - self._start

    @property
    def fraction(self) -> float | None:
        """Part of the job that is done; None if unknown."""
        total = sum(self._steps.values())
        return self._before / total if total and self._step_start else None

    @property
    def seconds_left(self) -> float | None:
        """Estimate of the time left, from the time that earlier steps took; None if unknown."""
        done = self.fraction
        if not done:
            return None
        whole = self._step_start / done
        return max(0.0, whole - self.seconds)

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            with contextlib.suppress(OSError):  # The terminal may be closed.
                self._bar.stop()
            self._bar = None
        self._show("done" if kind is None else "stopped")

    def _show(self, state: str) -> None:
        if self._quiet:
            return
        # A job does not fail because nobody can see its progress.
        with contextlib.suppress(OSError):
            if self._bar is None:
                self._stream.write(f"[{self.seconds:6.1f} s] {self._title}: {state}\n")
                self._stream.flush()
            else:
                done = self.fraction
                self._bar.update(
                    self._bar.task_ids[0],
                    description=state,
                    completed=done or 0,
                    total=None if done is None else 1,
                )

    def _start_bar(self) -> Any:
        """Return a running bar of rich; None without rich, or if the cursor cannot be moved."""
        try:
            from rich import progress as rich
            from rich.console import Console
            from rich.table import Column
            from rich.text import Text
        except ImportError:
            return None
        console = Console(file=self._stream)
        if not console.is_interactive:
            return None

        class Times(rich.ProgressColumn):
            def render(column, task: rich.Task) -> Text:  # noqa: ARG002, N805
                left = self.seconds_left
                rest = "" if left is None else f", about {left:.0f} s left"
                return Text(f"{self.seconds:.0f} s{rest}")

        def whole() -> Column:
            return Column(no_wrap=True, min_width=4)

        # On a narrow terminal the step and its time matter most.
        name = (
            rich.TextColumn(self._title, style="bold", markup=False, table_column=whole()),
            rich.BarColumn(bar_width=20),
        )
        bar = rich.Progress(
            rich.SpinnerColumn(table_column=Column(min_width=1)),
            *(name if console.width >= _NARROW else ()),
            Times(table_column=whole()),
            rich.TextColumn("{task.description}", markup=False, table_column=whole()),
            console=console,
            transient=True,
            # Results go to stdout, also while they are redirected to a file.
            redirect_stdout=sys.stdout.isatty(),
        )
        bar.add_task("", total=None)
        bar.start()
        return bar
