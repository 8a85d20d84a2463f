"""Standard streams and signals of the process that runs a command."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType
from typing import TextIO

from dcnv3_tvm.errors import DCNv3Error


class StdoutClosedError(Exception):
    """The reader of stdout, such as `head`, has stopped reading."""


@contextlib.contextmanager
def prepared_process() -> Iterator[list[int]]:
    """Handle signals so that commands clean up, and streams that are closed or full.

    Ctrl-C raises KeyboardInterrupt, and SIGTERM and SIGHUP raise SystemExit. Libraries may replace
    these by errors of their own, so the signals received are listed in what is yielded.
    """
    received: list[int] = []

    def handle(number: int, _: FrameType | None) -> None:
        received.append(number)
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(exit_code(number))

    with contextlib.ExitStack() as stack:
        for name in ("stdout", "stderr"):
            if getattr(sys, name) is None:  # Closed by the caller: `dcnv3-tvm models >&-`.
                setattr(sys, name, stack.enter_context(open(os.devnull, "w", encoding="utf-8")))
                stack.callback(setattr, sys, name, None)
        if threading.current_thread() is threading.main_thread():
            # Windows has no SIGHUP.
            for number in filter(None, map(vars(signal).get, ("SIGINT", "SIGTERM", "SIGHUP"))):
                # A caller's own handler stays, and `nohup` keeps ignoring SIGHUP.
                if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
                    stack.callback(signal.signal, number, signal.signal(number, handle))
        try:
            yield received
        finally:
            # Python's own flush at exit would print a traceback.
            for stream in (sys.stdout, sys.stderr):
                with contextlib.suppress(DCNv3Error, StdoutClosedError):
                    _write(stream, "")


def write(text: str) -> None:
    """Write a line to stdout.

    Raises
    ------
    StdoutClosedError
        If the reader has closed it.
    DCNv3Error
        If it cannot be written, for example because a disk is full.
    """
    _write(sys.stdout, text + "\n")


def report(text: str) -> None:
    """Write a line to stderr, if that is possible."""
    with contextlib.suppress(DCNv3Error, StdoutClosedError):
        _write(sys.stderr, text + "\n")


def _write(stream: TextIO, text: str) -> None:
    # File names may hold bytes that are no text.
    encoding = getattr(stream, "encoding", None) or "utf-8"
    try:
        stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
        stream.flush()
    except OSError as error:
        # What is left in the buffer would raise again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        # Windows reports a closed pipe as an invalid argument.
        if isinstance(error, BrokenPipeError) or (os.name == "nt" and error.errno == errno.EINVAL):
            raise StdoutClosedError from error
        raise DCNv3Error("the result cannot be written to stdout", got=error.strerror) from error


def exit_code(number: int) -> int:
    """Return the exit code of a process that a signal has ended, as shells do."""
    return 128 + number
