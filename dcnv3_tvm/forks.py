"""Locks of a process that may fork while other threads hold them."""

from __future__ import annotations

import contextlib
import os
import threading


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
