"""Load TVM's runtime library into this process, and open compiled code with it.

TVM's Python package is never imported here. If it is imported before or afterwards, the process
still holds one runtime library.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import importlib
import importlib.metadata
import importlib.util
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, Final

from dcnv3_tvm.checks import integer
from dcnv3_tvm.environment import OMP_NUM_THREADS, TVM_LIBRARY_PATH, TVM_NUM_THREADS
from dcnv3_tvm.errors import (
    INSTALL_FFI,
    ArtifactError,
    MissingDependencyError,
    first_line,
)
from dcnv3_tvm.forks import fork_safe_lock
from dcnv3_tvm.machine import physical_cores, usable_cores
from dcnv3_tvm.runtime import copied_library, thread_pool
from dcnv3_tvm.runtime.metadata import LIBRARY, RUNTIME_LIBRARY
from dcnv3_tvm.tvm_workarounds.process import set_max_concurrency, without_torch

CPU: Final = (1, 0)
"""DLPack's device type and index of the CPU."""

MAX_THREADS: Final = 1024
"""Largest number of threads of a model; the process ends if the system cannot create them."""

_POOLED_ALLOCATOR: Final = 2
_SHARE_ALL_CORES: Final = -3

_thread_state = threading.local()
_lock = fork_safe_lock()
_loaded_version: str | None = None


def tvm_ffi() -> ModuleType:
    """Import tvm_ffi, but not PyTorch with it.

    Raises
    ------
    MissingDependencyError
        If it is not installed.
    """
    loaded = sys.modules.get("tvm_ffi")
    if loaded is not None:
        return loaded
    try:
        with without_torch():
            return importlib.import_module("tvm_ffi")
    except ImportError as error:
        raise MissingDependencyError(
            "apache-tvm-ffi, which runs compiled models, is not installed",
            hint=INSTALL_FFI,
        ) from error


def installed_runtime() -> tuple[Path, str] | None:
    """Return the path and TVM version of the installed runtime library; None without one."""
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


def load_runtime(*, version: str, bundled: Path | None) -> None:
    """Load TVM's runtime library, unless this process holds one already.

    The installed TVM's library is preferred to the copy in the artifact.

    Parameters
    ----------
    version : str
        TVM version the artifact needs.
    bundled : Path, optional
        The copy in the artifact, if it has one.

    Raises
    ------
    ArtifactError
        If the process holds another version, or no library can be loaded.
    MissingDependencyError
        If there is none.
    """
    global _loaded_version
    ffi = tvm_ffi()
    with _lock:
        if _loaded_version is None:
            _loaded_version = _version_of_imported_tvm()
        if _loaded_version is None:
            path, found = installed_runtime() or (bundled, version)
            _check_version(found, version)
            if path is None:
                raise MissingDependencyError(
                    f"the artifact was compiled without {RUNTIME_LIBRARY}, and apache-tvm, which "
                    "has it, is not installed",
                    hint=f"{INSTALL_FFI} apache-tvm=={version}",
                )
            load_global(path)
            _loaded_version = found
    _check_version(_loaded_version, version)
    if ffi.get_global_func("runtime.NumThreads", allow_missing=True) is None:
        raise ArtifactError(
            f"{RUNTIME_LIBRARY} is not a TVM runtime library",
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
            "the artifact was compiled with another version of TVM than this process has loaded",
            got=f"TVM {found}",
            allowed=f"TVM {needed}",
            hint=f"Compile the model again, or run: pip install apache-tvm=={needed}",
        )


def load_global(path: Path) -> None:
    """Load a library of TVM's runtime, with its symbols visible to libraries loaded later.

    Raises
    ------
    ArtifactError
        If it cannot be loaded.
    """
    try:
        try:
            ctypes.CDLL(str(path), ctypes.RTLD_GLOBAL)
        except OSError as error:
            if not copied_library.is_denied(error):
                raise
            copied_library.load(path.read_bytes(), _load_global)
    except OSError as error:
        raise ArtifactError(
            f"TVM's runtime library {path.name} cannot be loaded",
            got=error,
            hint="Copy the artifact again, or install apache-tvm for this system.",
        ) from error


def _load_global(path: str) -> None:
    ctypes.CDLL(path, ctypes.RTLD_GLOBAL)


def open_library(code: bytes, *, permanent: bool = True) -> Any:
    """Open a compiled shared library.

    A private copy is loaded: ``dlopen`` returns the old code for a path it has loaded before, and
    overwriting a mapped file kills the process.

    Parameters
    ----------
    code : bytes
        Content of a ``model.so``.
    permanent : bool
        Whether it stays loaded until the process ends. Otherwise no object that it makes, such as a
        result of a Relax function, may outlive it.

    Raises
    ------
    ArtifactError
        If it cannot be loaded.
    """
    ffi = tvm_ffi()
    # `tvm_ffi.load_module` would find the loader by the extension of the path.
    load = ffi.get_global_func("ffi.Module.load_from_file.so")
    with _load_errors():
        module = copied_library.load(code, lambda path: load(path, "so"))
    if permanent:
        ffi.get_global_func("ffi.ModuleGlobalsAdd")(module)
    return module


@dataclasses.dataclass(frozen=True)
class Executables:
    """Virtual machines that run a model side by side.

    Parameters
    ----------
    machines : list of tvm_ffi.Module
        The virtual machines.
    pooled : bool
        Whether loops run on the `thread_pool`.
    """

    machines: list[Any]
    pooled: bool = False


def open_executables(code: bytes, device: tuple[int, int] = CPU, count: int = 1) -> Executables:
    """Open a compiled model.

    Parameters
    ----------
    code : bytes
        Content of a ``model.so``.
    device : (int, int)
        DLPack's device type and index.
    count : int
        Number of virtual machines.

    Raises
    ------
    ArtifactError
        If it cannot be loaded.
    """
    # The CPU is added for a GPU model, because shapes are computed there.
    devices = [(*place, _POOLED_ALLOCATOR) for place in dict.fromkeys((device, CPU))]
    with _lock, _load_errors():  # A fork waits for the lock, and so for locks of TVM.
        module = open_library(code)
        machines = [module["vm_load_executable"]() for _ in range(count)]
        for machine in machines:
            machine["vm_initialization"](*(number for place in devices for number in place))
        return Executables(machines, thread_pool.join(module))


@contextlib.contextmanager
def _load_errors() -> Iterator[None]:
    try:
        yield
    except ArtifactError:
        raise
    except (AttributeError, OSError, RuntimeError, ValueError) as error:
        raise ArtifactError(
            f"{LIBRARY} cannot be loaded",
            got=first_line(error),
            hint="Compile the model again for this machine.",
        ) from error


def default_threads() -> int:
    """Return the number of threads a model uses by default.

    It is ``TVM_NUM_THREADS``, else ``OMP_NUM_THREADS``, else the number of physical cores.
    See tvm_workarounds: thread-pool-default.
    """
    for variable in (TVM_NUM_THREADS, OMP_NUM_THREADS):
        value = (variable.value or "").strip()
        if value.isdecimal() and int(value) > 0:
            return int(value)
    return physical_cores()


def use_threads(count: int, *, pool_size: int | None = None) -> None:
    """Run parallel loops, when called from this thread, on `count` threads.

    TVM has one thread pool per calling thread, and fixes its maximum size on first use. If TVM was
    used from this thread before, fewer threads may be available. Loops on the `thread_pool` do not
    need this function: a process does not fork after it.

    Parameters
    ----------
    count : int
        Number of threads.
    pool_size : int, optional
        Size of the thread pool if it is created; by default at least `default_threads`.

    Raises
    ------
    InvalidArgumentError
        If `count` is less than one.
    """
    thread_pool.use_threads(count)
    if getattr(_thread_state, "count", None) == count:
        return
    integer("threads", count, low=1)
    ffi = tvm_ffi()
    set_max_concurrency(pool_size or max(count, default_threads()))
    # No thread is pinned. See tvm_workarounds: thread-pool-affinity.
    cores = [str(core) for core in sorted(usable_cores())]
    ffi.get_global_func("runtime.config_threadpool")(_SHARE_ALL_CORES, count, cores)
    _thread_state.count = count
