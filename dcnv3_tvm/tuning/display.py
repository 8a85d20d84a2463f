"""Live display of a tuning session on stderr."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Final, TextIO

from dcnv3_tvm.tuning.summary import totals_text

if TYPE_CHECKING:
    from dcnv3_tvm.tuning.session import TuningSession
    from dcnv3_tvm.tuning.task_state import TaskState

_SCREEN_INTERVAL: Final = 0.2
_LINE_INTERVAL: Final = 5.0
_DUMB: Final = ("dumb", "unknown")
"""Values of ``TERM`` of terminals that move no cursor."""

_HOME: Final = "\x1b[H"
_CLEAR: Final = "\x1b[2J"
_CLEAR_LINE: Final = "\x1b[K"
_CLEAR_BELOW: Final = "\x1b[J"


class Display:
    """Table of kernels that refreshes in place on a terminal; one line every 5 s elsewhere.

    Parameters
    ----------
    stream : text stream, optional
        Standard error by default.
    clock : callable, optional
        Returns the time in seconds.
    """

    def __init__(
        self, stream: TextIO | None = None, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._stream = sys.stderr if stream is None else stream
        self._clock = clock
        self._is_terminal = self._stream.isatty() and os.environ.get("TERM") not in _DUMB
        self._interval = _SCREEN_INTERVAL if self._is_terminal else _LINE_INTERVAL
        self._last = 0.0
        self._stage = ""

    def show(self, session: TuningSession) -> None:
        """Show the session, if its stage changed or the refresh interval has passed."""
        now = self._clock()
        if now - self._last < self._interval and session.stage == self._stage:
            return
        is_first = not self._stage
        self._last, self._stage = now, session.stage
        if not self._is_terminal:
            text = headline(session) + "\n"
        else:
            columns, rows = self._size()
            lines = screen(session, columns, rows - 1)
            text = "".join(f"{line}{_CLEAR_LINE}\n" for line in lines)
            text = (_CLEAR if is_first else "") + _HOME + text + _CLEAR_BELOW
        # The search goes on if nobody can see it, as after the terminal was closed.
        with contextlib.suppress(OSError):
            self._stream.write(text)
            self._stream.flush()

    def _size(self) -> tuple[int, int]:
        """Return columns and lines of the terminal; stdout may be redirected."""
        with contextlib.suppress(OSError):
            size = os.get_terminal_size(self._stream.fileno())
            if all(size):
                return size
        return shutil.get_terminal_size()


def headline(session: TuningSession) -> str:
    """Return the progress of a session in one line."""
    measured = [state for state in session.states if state.default_seconds is not None]
    totals = totals_text(
        trials=session.trials,
        max_trials=session.budget.trials,
        trials_per_minute=session.trials_per_minute,
        before=sum(state.default_total for state in measured),
        after=sum(state.best_total for state in measured),
    )
    left = f", {session.seconds_left / 60:.1f} min left" if session.stage == "search" else ""
    return f"[{session.seconds:6.1f} s] {session.stage}: {totals}{left}"


def screen(session: TuningSession, columns: int, lines: int) -> list[str]:
    """Return the lines of a screen: progress and a table of kernels.

    Parameters
    ----------
    session : TuningSession
        The session.
    columns, lines : int
        Size of the screen.
    """
    context = session.context
    head = [
        f"tune for {context.target} on {context.hardware}: {session.directory}",
        headline(session),
        "Ctrl-C ends the search and keeps the best schedules.",
        "",
        " share    default       best speedup    trials failed  kernel",
    ]
    states = sorted(session.states, key=lambda state: -state.default_total)
    total = sum(state.default_total for state in states) or 1.0
    rows_left = max(0, lines - len(head) - 1)
    rows = [_row(state, total) for state in states[:rows_left]]
    hidden = len(states) - len(rows)
    foot = [f"... and {hidden} more"] if hidden else []
    return [line[:columns] for line in (*head, *rows, *foot)]


def _row(state: TaskState, total: float) -> str:
    default, best = state.default_seconds, state.best_seconds
    times = [f"{1e6 * seconds:8.1f}us" if seconds else "-" for seconds in (default, best)]
    return (
        f"{100 * state.default_total / total:5.1f}% {times[0]:>10} {times[1]:>10} "
        f"{state.speedup:6.2f}x {state.trials:>4}/{min(state.task.size, 9999):<4} "
        f"{state.failed:>6}  {state.task.calls} x {state.task.kernel}"
    )
