"""Processes that may crash, hang or be killed, and cost nothing but their own job."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from typing import Any, Final

_PRELOAD: Final = ["dcnv3_tvm.tuning.jobs"]
"""What the process that others are forked from imports, once: TVM takes seconds."""

_GRACE: Final = 5
"""Seconds beyond its time in which a job is ended from outside."""

_LINES, _LENGTH = 3, 300
"""What is kept of an error's text: compilers say much, and the reason last."""

Job = Callable[[], Any]
"""What a process is to do: something that can be pickled, such as a `functools.partial`."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of a job.

    Parameters
    ----------
    value : object
        What it returned.
    error : str
        What went wrong, in one line; empty if nothing.
    """

    value: Any = None
    error: str = ""


class Pool:
    """Processes that work off jobs.

    They are forked from one process that has imported TVM and computed nothing, so that one is
    there within some milliseconds, as good as new.

    Parameters
    ----------
    size : int
        Jobs at a time.
    fresh : bool
        Whether each job gets a process of its own, so that none meets the memory of another.
        Otherwise only one in which a job has failed is replaced.
    """

    def __init__(self, size: int, *, fresh: bool) -> None:
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(_PRELOAD)
        # It takes over from this process that Ctrl-C is ignored, before it can do so itself.
        with _on_interrupt(signal.SIG_IGN):
            forkserver.ensure_running()
        self._size = size
        self._fresh = fresh
        self._idle: list[_Worker] = []
        self._busy: dict[Connection, _Worker] = {}

    def run(self, jobs: Iterable[Job], *, timeout: float) -> Iterator[tuple[int, Outcome]]:
        """Do jobs, and yield the number of each with its outcome, in the order they are done in.

        Parameters
        ----------
        jobs : iterable of callable
            They are taken when there is a process for them.
        timeout : float
            Seconds that a job may take.
        """
        # A run that was broken off has left some.
        for worker in self._busy.values():
            worker.stop()
        self._busy.clear()
        waiting = iter(enumerate(jobs))
        more = True
        while more or self._busy:
            while more and len(self._busy) < self._size:
                numbered = next(waiting, None)
                if numbered is None:
                    more = False
                else:
                    worker = self._idle.pop() if self._idle else _Worker(self._context)
                    worker.start(*numbered, timeout)
                    self._busy[worker.connection] = worker
            yield from self._finished()

    def _finished(self) -> Iterator[tuple[int, Outcome]]:
        """Wait until a job is done or its time is over."""
        now = time.monotonic()
        soonest = min((worker.deadline for worker in self._busy.values()), default=now)
        wait(list(self._busy), max(0.0, soonest - now))
        for worker in list(self._busy.values()):
            outcome = worker.outcome()
            if outcome is None:
                continue
            del self._busy[worker.connection]
            # What failed may have left its process unfit: a GPU refuses all that follows a fault.
            if self._fresh or outcome.error:
                worker.stop()
            else:
                self._idle.append(worker)
            yield worker.number, outcome

    def close(self) -> None:
        """End all processes, whatever they do."""
        for worker in (*self._idle, *self._busy.values()):
            worker.stop()
        self._idle.clear()
        self._busy.clear()

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Worker:
    """A process, and the job it does."""

    def __init__(self, context: Any) -> None:
        self.connection, theirs = context.Pipe()
        self._process = context.Process(target=_work, args=(theirs,), daemon=True)
        # Broken off in the middle of a request, the process that forks others dies of it.
        interrupts: list[int] = []
        with _on_interrupt(lambda number, _: interrupts.append(number)):
            self._process.start()
        theirs.close()
        if interrupts:
            signal.raise_signal(signal.SIGINT)
        self.number = -1
        self.deadline = 0.0
        self._timeout = 0.0

    def start(self, number: int, job: Job, timeout: float) -> None:
        self.number, self._timeout = number, timeout
        self.deadline = time.monotonic() + timeout
        self.connection.send((job, timeout))

    def outcome(self) -> Outcome | None:
        """Return what became of the job; None while it is being done."""
        try:
            if self.connection.poll():
                outcome: Outcome = self.connection.recv()
                return outcome
        except (EOFError, ConnectionResetError):
            self._process.join()
            return Outcome(error=_death(self._process.exitcode))
        if time.monotonic() < self.deadline:
            return None
        return Outcome(error=f"took more than {self._timeout:g} s")

    def stop(self) -> None:
        self._process.kill()
        self._process.join()
        self.connection.close()


@contextlib.contextmanager
def _on_interrupt(handler: Any) -> Iterator[None]:
    """Let Ctrl-C do something else for a moment."""
    if threading.current_thread() is not threading.main_thread():
        # No other thread is interrupted, nor may it say what an interrupt does.
        yield
        return
    before = signal.signal(signal.SIGINT, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _death(exit_code: int | None) -> str:
    if exit_code is not None and exit_code < 0:
        return f"crashed ({signal.Signals(-exit_code).name})"
    return f"ended by itself (exit code {exit_code})"


def _work(connection: Connection) -> None:
    """Do one job after another, until the parent is gone."""
    # Ctrl-C reaches every process of a terminal: the parent decides what becomes of this one.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # What libraries print would disturb what the parent shows.
    sink = os.open(os.devnull, os.O_WRONLY)
    os.dup2(sink, 1)
    os.dup2(sink, 2)
    while True:
        try:
            job, timeout = connection.recv()
        except EOFError:
            return
        # Should the parent be killed, nobody else ends a job that hangs.
        signal.alarm(math.ceil(timeout) + _GRACE)
        try:
            outcome = Outcome(job())
        except Exception as error:
            text = " / ".join(str(error).strip().splitlines()[-_LINES:])
            outcome = Outcome(error=f"{type(error).__name__}: {text[-_LENGTH:]}")
        signal.alarm(0)
        connection.send(outcome)
