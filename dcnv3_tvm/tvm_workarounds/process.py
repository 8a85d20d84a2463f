"""Workarounds for a process that runs compiled models; they need no part of TVM's compiler."""

from __future__ import annotations

import contextlib
import ctypes
import sys
from collections.abc import Iterator
from typing import Final

_SET_MAX_CONCURRENCY: Final = "_ZN3tvm7runtime9threading17SetMaxConcurrencyEi"


@contextlib.contextmanager
def without_torch() -> Iterator[None]:
    """Block a first import of PyTorch. See tvm_workarounds: ffi-torch."""
    hidden = "torch" not in sys.modules
    if hidden:
        sys.modules["torch"] = None  # type: ignore[assignment]  # Python's way to block an import
    try:
        yield
    finally:
        if hidden:
            sys.modules.pop("torch", None)


def set_max_concurrency(threads: int) -> None:
    """Set the size of future thread pools. See tvm_workarounds: thread-pool-size."""
    function = getattr(ctypes.CDLL(None), _SET_MAX_CONCURRENCY, None)
    if function is not None:
        function(ctypes.c_int(threads))
