"""Calls of compiled code on the CPU, from any thread of a process that may fork and exit.

A fork waits for running calls, because they hold locks of TVM; so does the exit, because they use
what it destroys.
"""

from __future__ import annotations

import atexit
import collections
import os
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any, Final, Generic, TypeVar

from dcnv3_tvm.errors import InvalidArgumentError
from dcnv3_tvm.runtime import call_threads, library, thread_pool

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
        self.running: dict[int, _Call] = {}  # By the thread of the caller.
        self.closed = False
        _calls.register(self)

    def run(
        self,
        function: Callable[[ContextT], ResultT],
        threads: int,
        *,
        here: bool,
        rotate: bool = False,
    ) -> ResultT:
        """Call a function with a context. A signal handler of Python runs afterwards.

        Parameters
        ----------
        function : callable
            Runs compiled code.
        threads : int
            CPU threads of the call.
        here : bool
            Call it in this thread, because its loops run on the `thread_pool`.
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
        call = _Call(rotate)
        try:
            _calls.begin(self, call)
            if here:
                thread_pool.use_threads(threads)
                return function(call.context)
            return call_threads.run(lambda: function(call.context), threads)
        finally:
            try:
                _calls.end(self, call)
            finally:  # A signal handler may have interrupted it.
                _calls.end(self, call)

    def close(self) -> None:
        """Drop each context as soon as it is free; waiting and later calls raise an error."""
        _calls.close(self)


def call_here(
    function: Callable[..., None], arguments: Sequence[Any], threads: int, *, pooled: bool
) -> None:
    """Call compiled code that needs no context in this thread.

    Parameters
    ----------
    function : callable
        The compiled code.
    arguments : sequence
        Passed to it.
    threads : int
        CPU threads of the call.
    pooled : bool
        Whether its loops run on the `thread_pool`. Otherwise `threads` is one: without workers of
        TVM's pool, the process may fork.
    """
    caller = threading.get_ident()
    try:
        _calls.entered.append(caller)
        # Who forks looks at the list after it has announced that.
        if _calls.pausing:
            _calls.enter_later(caller)
        (thread_pool if pooled else library).use_threads(threads)
        function(*arguments)
    finally:
        if caller in _calls.entered:  # Else a signal handler has raised an error before.
            _calls.entered.remove(caller)
        if _calls.pausing:
            _calls.notify()


class _Call:
    __slots__ = ("caller", "context", "has_context", "rejected", "rotate", "turn")

    def __init__(self, rotate: bool) -> None:
        self.rotate = rotate
        self.caller = threading.get_ident()
        self.context: Any = None
        self.has_context = False
        self.rejected = False
        # An attribute of the module, because gevent replaces it.
        self.turn = threading.Lock()
        self.turn.acquire()


class _Calls:
    """The calls of the whole process. Its lock is not held while compiled code runs.

    A signal handler of Python runs between any two calls of functions, in the main thread, and may
    fork, call a model or raise an error.
    """

    def __init__(self) -> None:
        self._all: weakref.WeakSet[Contexts[Any]] = weakref.WeakSet()
        self.entered: list[int] = []  # Threads within `call_here`, which uses these two unlocked.
        self.pausing = False  # Another thread forks, or the process exits.
        self._start_empty()

    def _start_empty(self) -> None:
        self._lock = threading.RLock()
        self._state = threading.Condition(self._lock)
        self._forks = 0
        self._exiting = False
        self.pausing = False
        self._process = os.getpid()

    def register(self, contexts: Contexts[Any]) -> None:
        with self._lock:
            self._all.add(contexts)

    def begin(self, contexts: Contexts[Any], call: _Call) -> None:
        """Wait for a context."""
        self._notice_fork()
        with self._lock:
            if contexts.closed:
                raise closed_error()
            outer = contexts.running.get(call.caller)
            if outer is None:
                contexts.waiting.append(call)
                self._admit(contexts)
        if outer is not None:  # Of a signal handler: that call goes on after this one.
            call_threads.finish_own_call()
            call.context = outer.context
            return
        call.turn.acquire()
        if call.rejected:
            raise closed_error()

    def end(self, contexts: Contexts[Any], call: _Call) -> None:
        """Release the context, if the call has one; then do nothing."""
        with self._lock:
            if call.has_context:
                # No function is called until the context is free.
                call.has_context = False
                del contexts.running[call.caller]
                if contexts.closed:
                    pass
                elif call.rotate:
                    contexts.free[:0] = [call.context]
                else:
                    contexts.free += [call.context]
            elif call in contexts.waiting:
                contexts.waiting.remove(call)
            self._admit(contexts)
            if self.pausing:
                self._state.notify_all()

    def _admit(self, contexts: Contexts[Any]) -> None:
        """Let waiting calls begin for which a context is free; after `close`, reject them."""
        for call in list(contexts.waiting):
            if not contexts.closed:
                if not contexts.free:
                    return
                if not self._may_begin(call.caller):
                    continue
            place = contexts.waiting.index(call)
            # No function is called until the caller is woken.
            del contexts.waiting[place]
            if contexts.closed:
                call.rejected = True
            else:
                call.has_context = True
                contexts.running[call.caller] = call
                call.context = contexts.free[-1]
                del contexts.free[-1]
            call.turn.release()

    def enter_later(self, caller: int) -> None:
        """Wait until a call that has entered may begin."""
        self._notice_fork()
        with self._lock:
            self.entered.remove(caller)
            self._state.notify_all()
            self._state.wait_for(lambda: self._may_begin(caller))
            self.entered.append(caller)

    def notify(self) -> None:
        """Say that a call has ended."""
        with self._lock:
            self._state.notify_all()

    def _notice_fork(self) -> None:
        if self._process != os.getpid():  # A server in C, such as uWSGI, forks without Python.
            self.after_fork_in_child()

    def _may_begin(self, caller: int) -> bool:
        """Return whether a call may begin while another thread forks, or the process exits.

        A daemon thread of a process that exits waits for ever.
        """
        is_main = caller == threading.main_thread().ident
        if not self._forks and (is_main or not self._exiting):
            return True
        return caller in self._callers()  # A signal handler: the fork waits for its thread.

    def _callers(self) -> list[int]:
        return [*self.entered, *(caller for each in self._all for caller in each.running)]

    def _is_idle(self) -> bool:
        """Return whether no call runs, but of this thread, which handles a signal then."""
        here = threading.get_ident()
        return all(caller == here for caller in self._callers())

    def close(self, contexts: Contexts[Any]) -> None:
        with self._lock:
            contexts.closed = True
            contexts.all.clear()
            contexts.free.clear()
            self._admit(contexts)

    def before_exit(self) -> None:
        """Wait for running calls, and let daemon threads start no more."""
        self._notice_fork()
        with self._lock:
            self._exiting = self.pausing = True
            self._state.wait_for(self._is_idle)

    def before_fork(self) -> None:
        self._notice_fork()
        call_threads.finish_own_call()
        self._state.acquire()
        self._forks += 1
        self.pausing = True
        self._state.wait_for(self._is_idle)

    def after_fork_in_parent(self) -> None:
        self._forks -= 1
        self.pausing = self._exiting or self._forks > 0
        for contexts in self._all:
            self._admit(contexts)
        self._state.notify_all()
        self._state.release()

    def after_fork_in_child(self) -> None:
        """Forget the other threads, which do not exist in the child."""
        call_threads.forget()
        here = threading.get_ident()
        self._start_empty()
        self.entered = [caller for caller in self.entered if caller == here]
        for contexts in self._all:
            own = [call for call in contexts.waiting if call.caller == here]
            contexts.waiting = collections.deque(own)
            contexts.running = {
                caller: call for caller, call in contexts.running.items() if caller == here
            }
            used = [call.context for call in contexts.running.values()]
            contexts.free = [each for each in contexts.all if all(each is not x for x in used)]
            self._admit(contexts)


def closed_error() -> InvalidArgumentError:
    """Return the error of a call of a closed model."""
    return InvalidArgumentError("the model is closed", hint="Load it again.")


_calls: Final = _Calls()
# The process would abort if it exited during a call, of a daemon thread or interrupted by Ctrl-C.
atexit.register(_calls.before_exit)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_calls.before_fork,
        after_in_parent=_calls.after_fork_in_parent,
        after_in_child=_calls.after_fork_in_child,
    )
