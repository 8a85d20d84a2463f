"""Progress of a long job on stderr."""

from __future__ import annotations

import contextlib
import sys
import time
from types import TracebackType
from typing import TextIO


class Progress:
    """Print the current step of a job and the seconds since it started.

    On a terminal the steps overwrite one line; elsewhere each is a separate line.

    Parameters
    ----------
    title : str
        Name of the job, printed with its total time at the end.
    stream : text stream, optional
        Standard error by default.
    quiet : bool
        Print nothing.

    Examples
    --------
    >>> with Progress("compile", quiet=True) as progress:
    ...     progress.step("schedule")
    """

    def __init__(self, title: str, *, stream: TextIO | None = None, quiet: bool = False) -> None:
        self._title = title
        self._stream = sys.stderr if stream is None else stream
        self._quiet = quiet
        self._terminal = self._stream.isatty()
        self._start = time.monotonic()
        self._interval = 0.2 if self._terminal else 5.0
        self._shown = 0.0

    def step(self, name: str) -> None:
        """Start a step."""
        self._show(f"[{self.seconds:6.1f} s] {self._title}: {name}", last=False)

    def count(self, done: int, total: int) -> None:
        """Show how many items are done, their rate and the time left, at most every few seconds."""
        seconds = self.seconds
        if done == 0 or (done < total and seconds - self._shown < self._interval):
            return
        self._shown = seconds
        rate = done / max(seconds, 1e-9)
        left = (total - done) / rate
        self.step(f"{done} of {total}, {rate:.1f}/s, {left:.0f} s left")

    def note(self, text: str) -> None:
        """Show a message, also if the progress is not shown."""
        with contextlib.suppress(OSError):
            self._stream.write(f"\r\x1b[K{text}\n" if self._terminal else f"{text}\n")
            self._stream.flush()

    @property
    def seconds(self) -> float:
        """Seconds since the job started."""
        return time.monotonic() - self._start

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        outcome = "done" if kind is None else "stopped"
        self._show(f"[{self.seconds:6.1f} s] {self._title}: {outcome}", last=True)

    def _show(self, line: str, *, last: bool) -> None:
        if self._quiet:
            return
        # A job does not fail because nobody can see its progress.
        with contextlib.suppress(OSError):
            if self._terminal:
                # Return to the start of the line and clear it.
                self._stream.write(f"\r\x1b[K{line}" + ("\n" if last else ""))
            else:
                self._stream.write(f"{line}\n")
            self._stream.flush()
