"""The thread pool of this process, which compiled libraries for Linux bring with them.

It runs loops in the thread that calls them, and survives a fork. Libraries of other systems, those
linked without a C compiler, and older ones use TVM's pool (`dcnv3_tvm.runtime.call_threads`).
"""

from __future__ import annotations

import ctypes
import dataclasses
import threading
from typing import Any, Final

from dcnv3_tvm.forks import fork_safe_lock

JOIN: Final = "dcnv3_join_pool"
"""Function of a library with a pool: takes the address of another or 0; returns the one used."""

_USE_THREADS: Final = "dcnv3_use_threads"


@dataclasses.dataclass(frozen=True, slots=True)
class _Pool:
    address: int
    use_threads: Any


_thread_state = threading.local()
_lock = fork_safe_lock()
_pool: _Pool | None = None


def join(module: Any) -> bool:
    """Let the parallel loops of a library run on the pool of this process, and say if they do.

    Parameters
    ----------
    module : tvm_ffi.Module
        The library. If it is the first with a pool, its pool becomes that of the process.
    """
    global _pool
    try:
        function = module.get_function(JOIN, query_imports=True)
    except AttributeError:
        return False
    with _lock:
        if _pool is None:
            # Its code runs in threads that do not end: it must stay loaded, also at the exit.
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(module))
            _pool = _Pool(function(0), module.get_function(_USE_THREADS, query_imports=True))
        else:
            function(_pool.address)
    return True


def use_threads(count: int) -> None:
    """Run loops on `count` threads, if this thread calls them; without a pool, do nothing."""
    if _pool is not None and getattr(_thread_state, "count", 0) != count:
        _pool.use_threads(count)
        _thread_state.count = count
