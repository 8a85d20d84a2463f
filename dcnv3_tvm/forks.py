"""Locks of a process that may fork while other threads hold them."""

from __future__ import annotations

import contextlib
import functools
import os
import threading
from collections.abc import Callable, Iterator
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


def fork_safe_lock() -> contextlib.AbstractContextManager[bool]:
    """Return a reentrant lock that is free in a forked child: a fork waits for its holder.

    Make it when a module is imported. Locks made later are taken first by a fork, so a holder may
    wait for a lock that was made earlier, as locks of imported modules are.
    """
    lock = threading.RLock()
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(
            before=lock.acquire, after_in_parent=lock.release, after_in_child=lock.release
        )
    return lock


class RenewedLock:
    """A reentrant lock that a fork does not wait for; the child has a new one.

    For what takes long, and leaves nothing behind that a child needs.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._renew)

    def _renew(self) -> None:
        self._lock = threading.RLock()

    @contextlib.contextmanager
    def hold(self) -> Iterator[None]:
        """Hold the lock."""
        with self._lock:
            yield


def one_at_a_time(function: Callable[P, R]) -> Callable[P, R]:
    """Decorate a function so that other threads wait while a thread runs it."""
    lock = RenewedLock()

    @functools.wraps(function)
    def wrapper(*arguments: P.args, **keywords: P.kwargs) -> R:
        with lock.hold():
            return function(*arguments, **keywords)

    return wrapper
