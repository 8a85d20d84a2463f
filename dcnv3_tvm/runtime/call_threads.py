"""Threads that run compiled code whose loops use TVM's thread pool.

TVM gives every thread that calls such code a pool. In a forked child its threads are missing: calls
never return, nor does the exit (tvm_workarounds: thread-pool-fork). Therefore a caller hands its
call over to a thread of this module, and a child starts new ones.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, Final, TypeVar

from dcnv3_tvm.errors import DeviceError
from dcnv3_tvm.forks import fork_safe_lock
from dcnv3_tvm.runtime import library

ResultT = TypeVar("ResultT")

_lock = fork_safe_lock()
_idle: Final[list[_CallThread]] = []
_calls: Final[list[_Call]] = []


def run(function: Callable[[], ResultT], threads: int) -> ResultT:
    """Call a function in a thread of this module, and return when it has ended.

    Parameters
    ----------
    function : callable
        Runs compiled code.
    threads : int
        CPU threads of its loops.

    Raises
    ------
    DeviceError
        If the system starts no more threads.
    """
    call = _Call(function, threads)
    _calls.append(call)
    try:
        _take(threads).start(call)
        call.wait()
    finally:
        _calls.remove(call)
    if call.error is None:
        result: ResultT = call.value
        return result
    try:
        raise call.error
    finally:
        del call  # The traceback refers to this frame.


def finish_own_call() -> None:
    """Wait for the call of this thread, if it handles a signal during one."""
    here = threading.get_ident()
    for call in [call for call in _calls if call.started and call.caller == here]:
        call.wait()


def forget() -> None:
    """After a fork, forget the threads, which the child does not have."""
    _idle.clear()
    _calls[:] = [call for call in _calls if call.caller == threading.get_ident()]


class _Call:
    __slots__ = ("answered", "caller", "ended", "error", "function", "started", "threads", "value")

    def __init__(self, function: Callable[[], Any], threads: int) -> None:
        self.function = function
        self.threads = threads
        self.caller = threading.get_ident()
        self.value: Any = None
        self.error: BaseException | None = None
        self.started = self.ended = False
        # An attribute of the module, because gevent replaces it together with Thread. A bare lock,
        # because its hand-over is the fastest.
        self.answered = threading.Lock()
        self.answered.acquire()

    def run(self, pool_size: int) -> None:
        try:
            library.use_threads(self.threads, pool_size=pool_size)
            self.value = self.function()
        except BaseException as error:  # Whatever it is, it belongs to the caller.
            self.error = error

    def wait(self) -> None:
        """Wait for the end; Ctrl-C has its effect afterwards, as in other compiled code."""
        interrupt: BaseException | None = None
        while not self.ended:
            try:
                with self.answered:
                    pass
            except BaseException as error:  # noqa: PERF203  # Of a signal handler.
                interrupt = error
        if interrupt is not None:
            raise interrupt


class _CallThread:
    """A thread that has a thread pool of TVM.

    Parameters
    ----------
    pool_size : int
        Largest number of threads of a call.
    """

    def __init__(self, pool_size: int) -> None:
        self.pool_size = pool_size
        self._given = threading.Lock()
        self._given.acquire()
        self._call: _Call | None = None
        threading.Thread(target=self._loop, name="dcnv3-tvm", daemon=True).start()

    def start(self, call: _Call) -> None:
        self._call = call
        call.started = True  # A signal handler does not run before the release.
        self._given.release()

    def _loop(self) -> None:
        while self._given.acquire():
            call = self._call
            self._call = None
            assert call is not None
            call.run(self.pool_size)
            _idle.append(self)
            call.ended = True
            call.answered.release()
            del call  # Else it would live until the next one.


def _take(threads: int) -> _CallThread:
    """Return the last used thread that suffices: fewer threads of TVM spin on the cores."""
    with _lock:
        for index in reversed(range(len(_idle))):
            if _idle[index].pool_size >= threads:
                return _idle.pop(index)
    try:
        return _CallThread(threads)
    except RuntimeError as error:
        raise DeviceError(
            "the system starts no more threads",
            got=error,
            hint="Raise the limit of processes (ulimit -u, or the container's), or use fewer "
            "threads.",
        ) from error
