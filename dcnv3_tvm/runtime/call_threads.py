"""Threads that run compiled code on the CPU for the callers, so that the process may fork.

TVM gives every thread that calls compiled code a thread pool. In a forked child its threads are
missing: calls never return, nor does the exit (tvm_workarounds: thread-pool-fork). Therefore a
caller hands its call over to a thread of this module, and a child starts new ones. A fork waits for
running calls, because they hold locks of TVM.
"""

from __future__ import annotations

import atexit
import collections
import os
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any, Final, Generic, TypeVar

from dcnv3_tvm.errors import DeviceError, InvalidArgumentError
from dcnv3_tvm.runtime import library

ContextT = TypeVar("ContextT")
ResultT = TypeVar("ResultT")


class Contexts(Generic[ContextT]):
    """What a call needs for itself: as many calls run side by side, others wait in order.

    Parameters
    ----------
    contexts : sequence
        Passed to the called functions.
    """

    def __init__(self, contexts: Sequence[ContextT]) -> None:
        # Only `_Calls` uses these, with its lock held.
        self.all = list(contexts)
        self.free = list(contexts)
        self.waiting: collections.deque[_Call] = collections.deque()
        self.closed = False
        _calls.register(self)

    def run(
        self, function: Callable[[ContextT], ResultT], threads: int, *, rotate: bool = False
    ) -> ResultT:
        """Call a function with a context, in a thread of this module.

        Ctrl-C interrupts the wait for the result; the function still runs to its end.

        Parameters
        ----------
        function : callable
            Runs compiled code.
        threads : int
            CPU threads of the call.
        rotate : bool
            Use the context again after the other free ones. By default it is the first, because its
            memory is in the cache.

        Raises
        ------
        InvalidArgumentError
            If `close` was called.
        DeviceError
            If the system starts no more threads.
        """
        call = _Call(function, threads, rotate)
        _calls.submit(self, call)
        call.answered.acquire()
        error = call.error
        if error is None:
            result: ResultT = call.value
            return result
        try:
            raise error
        finally:
            del error  # Its traceback refers to this frame.

    def close(self) -> None:
        """Drop each context as soon as it is free; waiting and later calls raise an error."""
        _calls.close(self)


def call_here(function: Callable[..., None], arguments: Sequence[Any]) -> None:
    """Call compiled code that runs on one thread in the caller's: without a pool, it may fork.

    Parameters
    ----------
    function : callable
        The compiled code.
    arguments : sequence
        Passed to it.
    """
    _calls.begin_here()
    try:
        library.use_threads(1)
        function(*arguments)
    finally:
        _calls.end_here()


class _Call:
    __slots__ = ("answered", "caller", "error", "function", "rotate", "threads", "value")

    def __init__(self, function: Callable[[Any], Any], threads: int, rotate: bool) -> None:
        self.function = function
        self.threads = threads
        self.rotate = rotate
        self.caller = threading.get_ident()
        self.value: Any = None
        self.error: BaseException | None = None
        # An attribute of the module, because gevent replaces it together with Thread. A bare lock,
        # because its hand-over is the fastest.
        self.answered = threading.Lock()
        self.answered.acquire()

    def run(self, context: Any, pool_size: int) -> None:
        try:
            library.use_threads(self.threads, pool_size=pool_size)
            self.value = self.function(context)
        except BaseException as error:  # Whatever it is, it belongs to the caller.
            self.error = error

    def reject(self, error: BaseException) -> None:
        """Raise an error in the caller instead of running."""
        self.error = error
        self.answered.release()


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
        self._work: Any = None  # Contexts, the context and the call.
        threading.Thread(target=self._loop, name="dcnv3-tvm", daemon=True).start()

    def start(self, contexts: Contexts[Any], context: Any, call: _Call) -> None:
        self._work = (contexts, context, call)
        self._given.release()

    def _loop(self) -> None:
        while self._given.acquire():
            contexts, context, call = self._work
            self._work = None
            call.run(context, self.pool_size)
            _calls.finish(self, contexts, context, call)
            del contexts, context, call  # Else they would live until the next call.


class _Calls:
    """The calls of the whole process. Its lock is not held while compiled code runs."""

    def __init__(self) -> None:
        self._all: weakref.WeakSet[Contexts[Any]] = weakref.WeakSet()
        self._start_empty()

    def _start_empty(self) -> None:
        # Reentrant, because a signal handler may fork or call a model.
        self._lock = threading.RLock()
        self._state = threading.Condition(self._lock)
        self._idle: list[_CallThread] = []
        self._running: set[_Call] = set()
        self._running_here: list[int] = []  # Threads of callers.
        self._forks = 0
        self._exiting = False
        self._process = os.getpid()

    def register(self, contexts: Contexts[Any]) -> None:
        with self._lock:
            self._all.add(contexts)

    def submit(self, contexts: Contexts[Any], call: _Call) -> None:
        if self._process != os.getpid():  # A server in C, such as uWSGI, forks without Python.
            self.after_fork_in_child()
        with self._lock:
            if contexts.closed:
                raise closed_error()
            if self._exiting and threading.current_thread() is not threading.main_thread():
                return  # Never answered: the caller is a daemon thread of a process that exits.
            contexts.waiting.append(call)
            self._start(contexts)

    def finish(
        self,
        thread: _CallThread,
        contexts: Contexts[Any],
        context: Any,
        call: _Call,
    ) -> None:
        with self._lock:
            self._running.remove(call)
            self._idle.append(thread)
            if not contexts.closed:
                contexts.free.insert(0 if call.rotate else len(contexts.free), context)
            if contexts.waiting:
                self._start(contexts)
            if self._forks or self._exiting:
                self._state.notify_all()
            call.answered.release()

    def begin_here(self) -> None:
        if self._process != os.getpid():
            self.after_fork_in_child()
        with self._lock:
            if self._forks or self._exiting:
                is_main = threading.current_thread() is threading.main_thread()
                # A daemon thread of a process that exits waits for ever.
                self._state.wait_for(lambda: not self._forks and (is_main or not self._exiting))
            self._running_here.append(threading.get_ident())

    def end_here(self) -> None:
        with self._lock:
            if threading.get_ident() in self._running_here:  # Not in a child forked by a signal.
                self._running_here.remove(threading.get_ident())
            if self._forks or self._exiting:
                self._state.notify_all()

    def _is_idle(self) -> bool:
        """Return whether no call runs, but of this thread, which handles a signal then."""
        here = threading.get_ident()
        return not self._running and all(caller == here for caller in self._running_here)

    def close(self, contexts: Contexts[Any]) -> None:
        with self._lock:
            contexts.closed = True
            contexts.all.clear()
            contexts.free.clear()
            while contexts.waiting:
                contexts.waiting.popleft().reject(closed_error())

    def _start(self, contexts: Contexts[Any]) -> None:
        """Start waiting calls for which a context is free."""
        while contexts.waiting and contexts.free and not self._forks:
            call = contexts.waiting.popleft()
            try:
                thread = self._take_thread(call.threads)
            except RuntimeError as error:
                call.reject(_thread_error(error))
                continue
            self._running.add(call)
            thread.start(contexts, contexts.free.pop(), call)

    def _take_thread(self, threads: int) -> _CallThread:
        """Return the last used thread that suffices: fewer threads of TVM spin on the cores."""
        for index in reversed(range(len(self._idle))):
            if self._idle[index].pool_size >= threads:
                return self._idle.pop(index)
        return _CallThread(threads)

    def before_exit(self) -> None:
        """Wait for running calls, and let daemon threads start no more."""
        with self._lock:
            self._exiting = True
            self._state.wait_for(self._is_idle)

    def before_fork(self) -> None:
        self._state.acquire()
        self._forks += 1
        self._state.wait_for(self._is_idle)

    def after_fork_in_parent(self) -> None:
        self._forks -= 1
        for contexts in self._all:
            self._start(contexts)
        self._state.notify_all()
        self._state.release()

    def after_fork_in_child(self) -> None:
        self._start_empty()
        for contexts in self._all:
            # The other callers do not exist in the child.
            own = [call for call in contexts.waiting if call.caller == threading.get_ident()]
            contexts.waiting = collections.deque(own)
            contexts.free = list(contexts.all)
            self._start(contexts)


def closed_error() -> InvalidArgumentError:
    """Return the error of a call of a closed model."""
    return InvalidArgumentError("the model is closed", hint="Load it again.")


def _thread_error(error: RuntimeError) -> DeviceError:
    return DeviceError(
        "the system starts no more threads",
        got=error,
        hint="Raise the limit of processes (ulimit -u, or the container's), or use fewer threads.",
    )


_calls: Final = _Calls()
# The process would abort if it exited during a call, of a daemon thread or interrupted by Ctrl-C.
atexit.register(_calls.before_exit)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_calls.before_fork,
        after_in_parent=_calls.after_fork_in_parent,
        after_in_child=_calls.after_fork_in_child,
    )
