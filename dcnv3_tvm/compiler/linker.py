"""Link object files to a shared library, for this system or another."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from dcnv3_tvm import files, targets
from dcnv3_tvm.environment import CXX
from dcnv3_tvm.errors import INSTALL_CROSS, MissingDependencyError, TargetError
from dcnv3_tvm.systems import SYSTEMS, System, this_system

if TYPE_CHECKING:
    from tvm.target import Target

_LD: Final = ("ld", "ld.lld")
_COMPILERS: Final = ("g++", "gcc", "clang++", "clang", "c++", "cc")
_OPTIONS: Final = {"macos": ("-undefined", "dynamic_lookup"), "windows": ()}
"""Options of a C++ compiler by operating system; of Linux, and others like it, by default."""

_ZIG: Final = (sys.executable, "-m", "ziglang")

_THREAD_POOL: Final = Path(__file__).with_name("linux") / "thread_pool.c"
_C_OPTIONS: Final = ("-x", "c", "-std=gnu11", "-O2", "-fPIC", "-fvisibility=hidden", "-c")

_WINDOWS: Final = Path(__file__).with_name("windows")

_ZIG_OPTIONS: Final = {
    "linux": ("-fPIC", "-nostdlib", "-Wl,-z,undefs"),
    "macos": ("-nostdlib", *_OPTIONS["macos"]),
    # memcpy and the functions of libm are in ucrtbase.dll.
    "windows": ("-nostdlib", "-Wl,--no-entry", "-lucrtbase", str(_WINDOWS / "stack_probe.s")),
}
"""Options of Zig. It would build a libc for the system, which takes minutes, and code needs none:
on Linux it finds the functions of libc and libm in the process that loads it."""


@dataclasses.dataclass(frozen=True)
class Linker:
    """A linker; calling it is an ``fcompile`` of TVM's ``export_library``.

    Parameters
    ----------
    command : tuple of str
        The program and its options.
    make_imports : tuple of str
        Program and options that write an import library, which Windows needs, after ``-l``.
    thread_pool : bytes
        Object file that is linked, too; empty without one.
    """

    command: tuple[str, ...]
    make_imports: tuple[str, ...] = ()
    thread_pool: bytes = b""

    def __call__(self, output: str, objects: Sequence[str], **_options: Any) -> None:
        """Link object files.

        Raises
        ------
        RuntimeError
            If the linker reports an error, as for code of another architecture.
        """
        imports = [f"{output}.lib"] if self.make_imports else []
        if imports:
            _run([*self.make_imports, "-l", *imports])
        objects = list(objects)
        if self.thread_pool:
            path = Path(objects[0]).with_name("thread_pool.o")
            path.write_bytes(self.thread_pool)
            objects.append(str(path))
        _run([*self.command, "-o", output, *objects, *imports])


def _run(command: Sequence[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise RuntimeError(f"{command[0]} cannot be run: {error}") from error
    if done.returncode != 0:
        raise RuntimeError(f"{command[0]} fails: {done.stderr.strip()}")


def find_ld() -> Linker | None:
    """Return this system's own linker, which needs no C++ compiler; None without one.

    What it links finds functions of libc and libm in the process that loads it.
    """
    path = next(filter(None, map(shutil.which, _LD)), None)
    if path is None:
        return None
    return Linker((path, "-shared", "-z", "noexecstack"), thread_pool=_thread_pool(this_system()))


def find_compiler(system: System) -> tuple[str, ...] | None:
    """Return the command of a C and C++ compiler for a system, as for `find_linker`; or None.

    Raises
    ------
    MissingDependencyError
        If ``$CXX`` cannot be run.
    """
    return _installed_compiler(system) or _zig_compiler(system)


def system_to_build(target: Target) -> System:
    """Return the system of a target that code can be linked for.

    Raises
    ------
    TargetError
        If it is unknown.
    """
    system = targets.target_system(target)
    if system is None:
        raise TargetError(
            "code for this system cannot be linked",
            got=target.attrs["mtriple"],
            allowed=f"{this_system().name} (this machine), {', '.join(SYSTEMS)}",
        )
    return system


def find_linker(system: System) -> Linker:
    """Return a linker for a system.

    It is ``$CXX``, if that is not for another system, else this system's C++ compiler, else Zig's
    from the package ``ziglang``. All only link, so that the processor they are for by default does
    not matter.

    Raises
    ------
    MissingDependencyError
        If there is none, or ``$CXX`` cannot be run.
    """
    installed = _installed_compiler(system)
    if installed is not None:
        options = ("-shared", *_OPTIONS.get(system.operating_system, ("-fPIC", "-pthread")))
        return Linker((*installed, *options), thread_pool=_thread_pool(system, "-DLINKED_TO_LIBC"))
    zig = _zig_compiler(system)
    if zig is not None:
        dlltool = (*_ZIG, "dlltool", "-m", "i386:x86-64", "-d", str(_WINDOWS / "tvm_ffi.def"))
        return Linker(
            (*zig, "-shared", *_ZIG_OPTIONS[system.operating_system]),
            dlltool if system.operating_system == "windows" else (),
            _thread_pool(system),
        )
    chosen = _chosen_compiler()
    given = "" if chosen is None else f", and $CXX ({shlex.join(chosen)}) is for another system"
    raise MissingDependencyError(
        f"there is no linker for {system.name}{given}",
        hint=f"{INSTALL_CROSS}, or set CXX to a C++ compiler for it.",
    )


def _installed_compiler(system: System) -> tuple[str, ...] | None:
    """Return ``$CXX``, if it is for a system, else this system's compiler for it, or None."""
    chosen = _chosen_compiler()
    if chosen is not None and _is_for(chosen, system):
        return chosen
    if system != this_system():
        return None
    native = next(filter(None, map(shutil.which, _COMPILERS)), None)
    return None if native is None else (native,)


def _zig_compiler(system: System) -> tuple[str, ...] | None:
    if system.name not in SYSTEMS or importlib.util.find_spec("ziglang") is None:
        return None
    return (*_ZIG, "cc", "-target", system.zig)


def _thread_pool(system: System, *options: str) -> bytes:
    """Return the thread pool as an object file; empty where there is none or no C compiler."""
    if system.operating_system != "linux":
        return b""
    try:
        compiler = find_compiler(system)
    except MissingDependencyError:
        return b""
    return b"" if compiler is None else _compile((*compiler, *options), _THREAD_POOL)


@functools.lru_cache(maxsize=8)
def _compile(compiler: Sequence[str], source: Path) -> bytes:
    with files.temporary_folder("pool-") as folder:
        output = Path(folder) / "thread_pool.o"
        try:
            _run([*compiler, *_C_OPTIONS, str(source), "-o", str(output)])
            return output.read_bytes()
        except (OSError, RuntimeError):  # For example without the headers of libc.
            return b""


def _chosen_compiler() -> tuple[str, ...] | None:
    chosen = CXX.value or ""
    return (tuple(shlex.split(chosen)) or None) if shutil.which(chosen) is None else (chosen,)


def _is_for(compiler: Sequence[str], system: System) -> bool:
    """Return whether a compiler links for a system, or does not say for which."""
    try:
        done = subprocess.run(
            [*compiler, "-dumpmachine"], capture_output=True, text=True, check=False
        )
    except OSError as error:
        raise MissingDependencyError(
            "the C++ compiler that CXX names cannot be run",
            got=f"CXX={shlex.join(compiler)} ({error.strerror})",
            hint="Unset CXX, or set it to a compiler.",
        ) from error
    triple = done.stdout.strip()
    return done.returncode != 0 or not triple or system.runs(triple)
