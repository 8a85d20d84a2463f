"""Workarounds for a process that runs compiled models; they need no part of TVM's compiler."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from collections.abc import Iterator
from typing import Final

_SET_MAX_CONCURRENCY: Final = "_ZN3tvm7runtime9threading17SetMaxConcurrencyEi"
_WINDOWS: Final = ("tvm_runtime.dll", "?SetMaxConcurrency@threading@runtime@tvm@@YAXH@Z")
"""Library and name of the function on Windows, which does not look in all libraries."""


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
    library, name = _WINDOWS if os.name == "nt" else (None, _SET_MAX_CONCURRENCY)
    function = getattr(ctypes.CDLL(library), name, None)
    if function is not None:
        function(ctypes.c_int(threads))
