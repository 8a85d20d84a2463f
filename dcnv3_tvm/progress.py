"""Progress of a long job on stderr."""

from __future__ import annotations

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

    def step(self, name: str) -> None:
        """Start a step."""
        self._show(f"[{self.seconds:6.1f} s] {self._title}: {name}", last=False)

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
        if self._terminal:
            # Return to the start of the line and clear it.
            self._stream.write(f"\r\x1b[K{line}" + ("\n" if last else ""))
        else:
            self._stream.write(f"{line}\n")
        self._stream.flush()
