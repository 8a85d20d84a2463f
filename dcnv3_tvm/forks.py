"""Locks of a process that may fork while other threads hold them."""

from __future__ import annotations

import contextlib
import functools
import os
import threading
from collections.abc import Callable
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


def one_at_a_time(function: Callable[P, R]) -> Callable[P, R]:
    """Decorate a function so that other threads wait while a thread runs it.

    A fork does not wait: in the child no thread runs it, unless it is the one that forked.
    """
    lock = threading.RLock()

    def renew() -> None:
        nonlocal lock
        lock = threading.RLock()

    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=renew)

    @functools.wraps(function)
    def wrapper(*arguments: P.args, **keywords: P.kwargs) -> R:
        with lock:
            return function(*arguments, **keywords)

    return wrapper
