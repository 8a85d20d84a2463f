"""Show on stderr what a session does: one screen on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import shutil
import sys
import time
from typing import TYPE_CHECKING, Final, TextIO

if TYPE_CHECKING:
    from dcnv3_tvm.tuning.session import Session
    from dcnv3_tvm.tuning.state import TaskState

_SCREEN_INTERVAL: Final = 0.2
_LINE_INTERVAL: Final = 5.0
_HOME: Final = "\x1b[H"
_CLEAR: Final = "\x1b[2J"
_CLEAR_LINE: Final = "\x1b[K"
_CLEAR_BELOW: Final = "\x1b[J"


class Display:
    """Shows a session.

    Parameters
    ----------
    stream : text stream, optional
        Standard error by default.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = sys.stderr if stream is None else stream
        self._terminal = self._stream.isatty()
        self._interval = _SCREEN_INTERVAL if self._terminal else _LINE_INTERVAL
        self._last = -self._interval
        self._stage = ""

    def show(self, session: Session) -> None:
        """Show what is new, unless that was done a moment ago."""
        now = time.monotonic()
        if now - self._last < self._interval and session.stage == self._stage:
            return
        first = not self._stage
        self._last, self._stage = now, session.stage
        if not self._terminal:
            self._stream.write(headline(session) + "\n")
        else:
            size = shutil.get_terminal_size()
            lines = screen(session, size.columns, size.lines - 1)
            text = "".join(f"{line}{_CLEAR_LINE}\n" for line in lines)
            self._stream.write((_CLEAR if first else "") + _HOME + text + _CLEAR_BELOW)
        self._stream.flush()


def headline(session: Session) -> str:
    """Say in one line how far a session is."""
    known = [state for state in session.states if state.default_seconds is not None]
    before = sum(state.default_total for state in known)
    after = sum(state.best_total for state in known)
    parts = [
        f"[{session.seconds:6.1f} s] {session.stage}",
        f"{session.trials} of {session.budget.trials} trials",
        f"{session.trials_per_minute:.0f} a minute",
    ]
    if after:
        parts.append(f"{1e3 * before:.3f} -> {1e3 * after:.3f} ms ({before / after:.3f}x)")
    if session.stage == "search":
        parts.append(f"{session.seconds_left / 60:.1f} min left")
    return ", ".join(parts)


def screen(session: Session, columns: int, lines: int) -> list[str]:
    """Return the lines of a screen: how far the session is, and its kernels.

    Parameters
    ----------
    session : Session
        The session.
    columns, lines : int
        Size of the screen.
    """
    setting = session.setting
    head = [
        f"tune for {setting.target} on {setting.hardware}: {session.directory}",
        headline(session),
        "Ctrl-C ends the search and keeps the best.",
        "",
        " share    default       best  faster    trials failed  kernel",
    ]
    states = sorted(session.states, key=lambda state: -state.best_total)
    total = sum(state.best_total for state in states) or 1.0
    room = max(0, lines - len(head) - 1)
    rows = [_row(state, total) for state in states[:room]]
    left = len(states) - len(rows)
    foot = [f"... and {left} more"] if left else []
    return [line[:columns] for line in (*head, *rows, *foot)]


def _row(state: TaskState, total: float) -> str:
    default, best = state.default_seconds, state.best_seconds
    times = [f"{1e6 * seconds:8.1f}us" if seconds else "-" for seconds in (default, best)]
    return (
        f"{100 * state.best_total / total:5.1f}% {times[0]:>10} {times[1]:>10} "
        f"{state.speedup:6.2f}x {state.trials:>4}/{min(state.task.size, 9999):<4} "
        f"{state.failed:>6}  {state.task.calls} x {state.task.kernel}"
    )
