"""Process pool whose jobs may crash, hang or be killed without affecting other jobs."""

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

_PRELOAD: Final = ["dcnv3_tvm.tuning.builder", "dcnv3_tvm.tuning.runner"]
"""Imported once by the fork server: importing TVM takes seconds."""

_ALARM_MARGIN: Final = 5
"""Seconds after its timeout at which a job kills its own process, if the parent is gone."""

_ERROR_LINES, _ERROR_LENGTH = 3, 300
"""Part of an exception's text that is kept: compilers print much, and the reason last."""

Job = Callable[[], Any]
"""A picklable callable, such as a `functools.partial`."""


@dataclasses.dataclass(frozen=True)
class JobResult:
    """Result of a job.

    Parameters
    ----------
    value : object
        Return value of the job.
    error : str
        One-line description of the failure; empty if the job succeeded.
    """

    value: Any = None
    error: str = ""


class ProcessPool:
    """Processes that run jobs in parallel.

    Processes are forked from a server that has imported TVM and computed nothing, so a new one
    starts in milliseconds with clean state.

    Parameters
    ----------
    size : int
        Jobs that run at the same time.
    fresh : bool
        Start a new process for each job, so that no job inherits the heap of another. Otherwise a
        process is replaced only after a failed job.
    """

    def __init__(self, size: int, *, fresh: bool) -> None:
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(_PRELOAD)
        # The server inherits that Ctrl-C is ignored, which also covers the time of its start.
        with _sigint_handler(signal.SIG_IGN):
            forkserver.ensure_running()
        self._size = size
        self._fresh = fresh
        self._idle: list[_PoolProcess] = []
        self._busy: dict[Connection, _PoolProcess] = {}

    def run(self, jobs: Iterable[Job], *, timeout: float) -> Iterator[tuple[int, JobResult]]:
        """Run jobs; yield the index of each with its result, in order of completion.

        Parameters
        ----------
        jobs : iterable of callable
            Consumed lazily: the next job is taken when a process is free.
        timeout : float
            Seconds after which a job is killed.
        """
        # Left over from a previous `run` whose iterator was not exhausted.
        for process in self._busy.values():
            process.stop()
        self._busy.clear()
        numbered_jobs = iter(enumerate(jobs))
        more = True
        while more or self._busy:
            while more and len(self._busy) < self._size:
                numbered = next(numbered_jobs, None)
                if numbered is None:
                    more = False
                else:
                    process = self._idle.pop() if self._idle else _PoolProcess(self._context)
                    process.start(*numbered, timeout)
                    self._busy[process.connection] = process
            yield from self._finished()

    def _finished(self) -> Iterator[tuple[int, JobResult]]:
        """Wait until a job finishes or times out; yield the results."""
        now = time.monotonic()
        soonest = min((process.deadline for process in self._busy.values()), default=now)
        wait(list(self._busy), max(0.0, soonest - now))
        for process in list(self._busy.values()):
            result = process.result()
            if result is None:
                continue
            del self._busy[process.connection]
            # A failed job may leave its process unusable: CUDA rejects every call after a fault.
            if self._fresh or result.error:
                process.stop()
            else:
                self._idle.append(process)
            yield process.number, result

    def close(self) -> None:
        """Kill all processes."""
        for process in (*self._idle, *self._busy.values()):
            process.stop()
        self._idle.clear()
        self._busy.clear()

    def __enter__(self) -> ProcessPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _PoolProcess:
    """A process and the job it runs."""

    def __init__(self, context: Any) -> None:
        self.connection, child_end = context.Pipe()
        self._process = context.Process(target=_run_jobs, args=(child_end,), daemon=True)
        # A KeyboardInterrupt in the middle of a fork request would kill the fork server.
        interrupts: list[int] = []
        with _sigint_handler(lambda number, _: interrupts.append(number)):
            self._process.start()
        child_end.close()
        if interrupts:
            signal.raise_signal(signal.SIGINT)
        self.number = -1
        self.deadline = 0.0
        self._timeout = 0.0

    def start(self, number: int, job: Job, timeout: float) -> None:
        self.number, self._timeout = number, timeout
        self.deadline = time.monotonic() + timeout
        self.connection.send((job, timeout))

    def result(self) -> JobResult | None:
        """Return the result of the job; None while it runs."""
        try:
            if self.connection.poll():
                result: JobResult = self.connection.recv()
                return result
        except (EOFError, ConnectionResetError):
            self._process.join()
            return JobResult(error=_exit_reason(self._process.exitcode))
        if time.monotonic() < self.deadline:
            return None
        return JobResult(error=f"took more than {self._timeout:g} s")

    def stop(self) -> None:
        self._process.kill()
        self._process.join()
        self.connection.close()


@contextlib.contextmanager
def _sigint_handler(handler: Any) -> Iterator[None]:
    """Replace the handler of SIGINT within a block."""
    if threading.current_thread() is not threading.main_thread():
        # Python delivers SIGINT to the main thread only, and only it may set handlers.
        yield
        return
    previous = signal.signal(signal.SIGINT, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


def _exit_reason(exit_code: int | None) -> str:
    if exit_code is not None and exit_code < 0:
        return f"crashed ({signal.Signals(-exit_code).name})"
    return f"exited with code {exit_code}"


def _run_jobs(connection: Connection) -> None:
    """Run jobs until the parent closes the connection."""
    # Ctrl-C in a terminal signals every process; the parent decides when this one ends.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Output of compilers would disturb the display of the parent.
    sink = os.open(os.devnull, os.O_WRONLY)
    os.dup2(sink, 1)
    os.dup2(sink, 2)
    while True:
        try:
            job, timeout = connection.recv()
        except EOFError:
            return
        # A killed parent cannot end a job that hangs.
        signal.alarm(math.ceil(timeout) + _ALARM_MARGIN)
        try:
            result = JobResult(job())
        except Exception as error:  # a failed job is a result
            text = " / ".join(str(error).strip().splitlines()[-_ERROR_LINES:])
            result = JobResult(error=f"{type(error).__name__}: {text[-_ERROR_LENGTH:]}")
        signal.alarm(0)
        connection.send(result)
