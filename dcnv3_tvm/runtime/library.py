"""TVM's runtime library in this process: find it, load it once, open compiled code with it.

TVM's Python package is never imported here; where it is imported already, or later, the process
still holds a single runtime library.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import importlib.metadata
import importlib.util
import os
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, Final

from dcnv3_tvm.environment import OMP_NUM_THREADS, TVM_LIBRARY_PATH, TVM_NUM_THREADS
from dcnv3_tvm.errors import (
    ArtifactError,
    InvalidArgumentError,
    MissingDependencyError,
    first_line,
)
from dcnv3_tvm.machine import physical_cores, usable_cores
from dcnv3_tvm.runtime.metadata import LIBRARY, RUNTIME_LIBRARY

CPU: Final = (1, 0)
"""DLPack's type and number of the processor."""

_POOLED_ALLOCATOR: Final = 2
_SHARE_ALL_CORES: Final = -3

_SET_MAX_CONCURRENCY: Final = "_ZN3tvm7runtime9threading17SetMaxConcurrencyEi"

_thread_state = threading.local()
_lock = threading.Lock()
_loaded_version: str | None = None


def tvm_ffi() -> ModuleType:
    """Import tvm_ffi without its side effect of importing PyTorch.

    Raises
    ------
    MissingDependencyError
        If it is not installed.
    """
    loaded = sys.modules.get("tvm_ffi")
    if loaded is not None:
        return loaded
    hide_torch = "torch" not in sys.modules
    if hide_torch:
        # tvm_ffi imports PyTorch wherever it is installed: a second and 200 MB we do not need.
        # PyTorch's tensors are taken all the same when it is imported later.
        sys.modules["torch"] = None  # type: ignore[assignment]
    try:
        return importlib.import_module("tvm_ffi")
    except ImportError as error:
        raise MissingDependencyError(
            "apache-tvm-ffi, which runs compiled models, is not installed",
            hint="Run: pip install 'apache-tvm-ffi>=0.1.14.post0,<0.1.15'",
        ) from error
    finally:
        if hide_torch:
            sys.modules.pop("torch", None)


def installed_runtime() -> tuple[Path, str] | None:
    """Return path and TVM version of the installed runtime library; None when there is none."""
    try:
        found = importlib.util.find_spec("tvm")
        version = importlib.metadata.version("apache-tvm")
    except (ImportError, ValueError):
        return None
    if found is None or found.origin is None:
        return None
    folders = [Path(found.origin).parent / "lib"]
    if TVM_LIBRARY_PATH.value:
        folders.insert(0, Path(TVM_LIBRARY_PATH.value))
    for folder in folders:
        path = folder / RUNTIME_LIBRARY
        if path.is_file():
            return path.resolve(), version
    return None


def load_runtime(*, version: str, bundled: Path) -> None:
    """Make sure that this process holds TVM's runtime library, once.

    Taken in this order: what is loaded already, the installed TVM's, the artifact's own.

    Parameters
    ----------
    version : str
        TVM version the artifact needs.
    bundled : Path
        The artifact's own copy.

    Raises
    ------
    ArtifactError
        If the version in the process is another one, or no library can be loaded.
    """
    global _loaded_version
    ffi = tvm_ffi()
    with _lock:
        if _loaded_version is None:
            _loaded_version = _version_of_imported_tvm()
        if _loaded_version is None:
            path, found = installed_runtime() or (bundled, version)
            _check_version(found, version)
            load_global(path)
            _loaded_version = found
    _check_version(_loaded_version, version)
    if ffi.get_global_func("runtime.NumThreads", allow_missing=True) is None:
        raise ArtifactError(
            f"{RUNTIME_LIBRARY} is no TVM runtime library",
            hint="Compile the model again, or reinstall apache-tvm.",
        )


def _version_of_imported_tvm() -> str | None:
    module = sys.modules.get("tvm")
    version = getattr(module, "__version__", None)
    return None if version is None else str(version)


def _check_version(found: str, needed: str) -> None:
    def release(text: str) -> list[str]:
        return text.split("+")[0].split(".")[:3]

    if release(found) != release(needed):
        raise ArtifactError(
            "the artifact was compiled with another TVM than this process runs",
            got=f"TVM {found}",
            allowed=f"TVM {needed}",
            hint=f"Compile the model again, or run: pip install apache-tvm=={needed}",
        )


def load_global(path: Path) -> None:
    """Load one of TVM's runtime libraries, its symbols seen by those loaded after it.

    Raises
    ------
    ArtifactError
        If it cannot be loaded.
    """
    try:
        ctypes.CDLL(str(path), ctypes.RTLD_GLOBAL)
    except OSError as error:
        raise ArtifactError(
            f"TVM's runtime library {path.name} cannot be loaded",
            got=error,
            hint="It is made for Linux on the processor architecture of the artifact.",
        ) from error


def open_library(code: bytes) -> Any:
    """Open compiled code.

    It is loaded from a private copy: a path that was loaded before gives the old code again for as
    long as the process lives, and a mapped file that is overwritten kills it.

    Parameters
    ----------
    code : bytes
        Content of a ``model.so``.

    Raises
    ------
    ArtifactError
        If it cannot be loaded.
    """
    ffi = tvm_ffi()
    with tempfile.TemporaryDirectory(prefix="dcnv3-tvm-") as folder:
        path = os.path.join(folder, LIBRARY)
        Path(path).write_bytes(code)
        with _unloadable():
            return ffi.load_module(path)


def open_executable(code: bytes, device: tuple[int, int] = CPU) -> Any:
    """Open compiled code and return its virtual machine, ready to be called on a device.

    Parameters
    ----------
    code : bytes
        Content of a ``model.so``.
    device : (int, int)
        DLPack's type and number.

    Raises
    ------
    ArtifactError
        If it cannot be loaded.
    """
    module = open_library(code)
    # The machine keeps literals on the processor, where shapes are computed, too.
    places = [(*place, _POOLED_ALLOCATOR) for place in dict.fromkeys((device, CPU))]
    with _unloadable():
        machine = module["vm_load_executable"]()
        machine["vm_initialization"](*(number for place in places for number in place))
    return machine


@contextlib.contextmanager
def _unloadable() -> Iterator[None]:
    try:
        yield
    except (AttributeError, OSError, RuntimeError, ValueError) as error:
        raise ArtifactError(
            f"{LIBRARY} cannot be loaded",
            got=first_line(error),
            hint="Compile the model again for this machine.",
        ) from error


def default_threads() -> int:
    """Return the threads a model uses unless told otherwise.

    TVM by itself takes half of the logical cores, also where a core has a single thread.
    """
    for variable in (TVM_NUM_THREADS, OMP_NUM_THREADS):
        value = (variable.value or "").strip()
        if value.isdecimal() and int(value) > 0:
            return int(value)
    return physical_cores()


def use_threads(count: int) -> None:
    """Let TVM's parallel loops, called from the present thread, use `count` threads.

    TVM keeps one thread pool for every calling thread, whose greatest size is fixed when it is
    first used: where another user of TVM was first, it may stay smaller.

    Raises
    ------
    InvalidArgumentError
        If `count` is less than one.
    """
    if getattr(_thread_state, "count", None) == count:
        return
    if count < 1:
        raise InvalidArgumentError(
            "threads is out of range", got=count, allowed="an integer of at least 1"
        )
    ffi = tvm_ffi()
    # No packed function sets the size of a pool that is yet to be made; this C++ function does.
    set_concurrency = getattr(ctypes.CDLL(None), _SET_MAX_CONCURRENCY, None)
    if set_concurrency is not None:
        set_concurrency(ctypes.c_int(max(count, default_threads())))
    # Left to itself TVM pins every thread but the caller's to a core, on which the caller's may run
    # as well, while another core is idle: now and then for half a second.
    cores = [str(core) for core in sorted(usable_cores())]
    ffi.get_global_func("runtime.config_threadpool")(_SHARE_ALL_CORES, count, cores)
    _thread_state.count = count
