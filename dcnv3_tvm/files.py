"""Write files and folders atomically."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import re
import secrets
import shutil
import tempfile
import time
import weakref
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Final

from dcnv3_tvm.errors import ArtifactError, DCNv3Error, InvalidArgumentError, os_reason

try:
    import fcntl
except ImportError:  # On Windows.
    fcntl = None  # type: ignore[assignment]

_AT_FDCWD: Final = -100
_RENAME_EXCHANGE: Final = 2
"""Linux's flag, and macOS's ``RENAME_SWAP``."""

_NEW_SECONDS: Final = 60

_TEMPORARY: Final = "dcnv3-tvm-tmp-"

CODE: Final = "code-"
"""Purpose of a temporary folder for a file that is open, or loaded as code, while it is in use."""

_OLD: Final = ".old"
"""Suffix of an old folder while the new one takes its name; never removed as stale."""


def temporary_folder(purpose: str = "") -> tempfile.TemporaryDirectory[str]:
    """Create a folder that is removed with the returned object, or at the end of a ``with`` block.

    If the process is killed, the next call in any process removes it; on Windows only a folder for
    `CODE`. What is in use cannot be removed there, and stays for that, too.

    Parameters
    ----------
    purpose : str
        A part of its name.

    Raises
    ------
    DCNv3Error
        If no folder can be created.
    """
    try:
        return _TemporaryFolder(purpose)
    except OSError as error:
        raise DCNv3Error(
            "no temporary folder can be created",
            got=error,
            hint="Set TMPDIR to a folder that is writable and has free space.",
        ) from error


@contextlib.contextmanager
def atomic_folder(destination: Path) -> Iterator[Path]:
    """Yield a temporary folder that is renamed to `destination` when the block succeeds.

    Any failure of the block (a full or read-only disk, Ctrl-C, any exception) removes the temporary
    folder and leaves `destination` unchanged. An existing folder is replaced atomically where the
    file system can exchange two names.

    Parameters
    ----------
    destination : Path
        The temporary folder is created in the same parent, hidden; missing parents are created.

    Raises
    ------
    OSError
        If a file cannot be written.
    """
    destination = destination.absolute()
    destination.parent.mkdir(parents=True, exist_ok=True)
    with _locked_sibling(destination, ".tmp", Path.mkdir) as temporary:
        try:
            yield temporary
            for path in sorted(temporary.rglob("*")):
                if path.is_file():
                    _flush(path)
            _replace(temporary, destination)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def kept_folder(folder: Path) -> Iterator[None]:
    """Let no `atomic_folder` of another process replace a folder during the block.

    Without locks, as on Windows, it may.
    """
    folder = Path(os.path.realpath(folder))  # Links are not locked.
    lock = _lock(folder)
    while lock is not None and not _is_open_as(lock, folder):
        _unlock(lock)  # The folder was replaced while this process waited.
        lock = _lock(folder)
    try:
        yield
    finally:
        _unlock(lock)


@contextlib.contextmanager
def atomic_file(destination: Path) -> Iterator[Path]:
    """Yield a temporary path whose file is renamed to `destination` when the block succeeds.

    Parameters
    ----------
    destination : Path
        The temporary file is in the same folder and has the same suffix.

    Raises
    ------
    OSError
        If the file cannot be written.
    """
    destination = destination.absolute()
    with _locked_sibling(destination, destination.suffix, Path.touch) as temporary:
        try:
            yield temporary
            _flush(temporary)
            os.replace(temporary, destination)
        finally:
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def output_file(what: str, destination: Path) -> Iterator[Path]:
    """Yield a temporary path as `atomic_file` does, for a file that a user asked for.

    Parameters
    ----------
    what : str
        Its content, for errors: ``"the results"``.
    destination : Path
        As for `atomic_file`.

    Raises
    ------
    InvalidArgumentError
        If the file cannot be written.
    """
    try:
        with atomic_file(destination) as temporary:
            yield temporary
    except OSError as error:
        raise InvalidArgumentError(
            f"{what} cannot be written", got=f"{error.strerror or error} ({destination})"
        ) from error


def check_replaceable(
    folder: Path, kind: str, *, required: Collection[str], allowed: Collection[str]
) -> None:
    """Check that a folder is free, empty, or of a kind and with nothing else in it.

    Parameters
    ----------
    folder : Path
        The folder.
    kind : str
        What it may be, such as ``"an artifact"``.
    required, allowed : collection of str
        Names that every folder of the kind has, and that it may have besides hidden ones.

    Raises
    ------
    ArtifactError
        If it is something else, which must not be replaced.
    """
    if not os.path.lexists(folder):
        return
    if folder.is_symlink():
        raise ArtifactError(
            "the destination is a symbolic link, so it is not replaced",
            got=f"{folder} to {os.readlink(folder)}",
            hint="Name the folder itself, or remove the link first.",
        )
    try:
        names = {entry.name for entry in folder.iterdir()} if folder.is_dir() else {"a file"}
    except OSError as error:
        raise ArtifactError(
            "the destination cannot be read, so it is not replaced", got=os_reason(error, folder)
        ) from error
    if names and not names.issuperset(required):
        raise ArtifactError(
            f"the destination exists and is not {kind}, so it is not replaced",
            got=folder,
            hint="Choose another folder, or remove it first.",
        )
    others = sorted(name for name in names.difference(allowed) if not name.startswith("."))
    if others:
        raise ArtifactError(
            f"the destination holds more than {kind}, so it is not replaced",
            got=f"{folder} with {', '.join(others[:3])}{', ...' if len(others) > 3 else ''}",
            hint="Move these files, or choose another folder.",
        )


class _TemporaryFolder(tempfile.TemporaryDirectory[str]):
    """A temporary folder that is locked as long as it is in use."""

    def __init__(self, purpose: str) -> None:
        _remove_stale(Path(tempfile.gettempdir()), f"{_TEMPORARY}.*")
        while True:
            super().__init__(prefix=f"{_TEMPORARY}{purpose}", ignore_cleanup_errors=True)
            self._unlock = weakref.finalize(self, _unlock, _lock(Path(self.name)))
            if os.path.exists(self.name):
                return
            self.cleanup()  # Another process has just taken it for stale.

    def cleanup(self) -> None:
        """Remove the folder."""
        super().cleanup()
        self._unlock()


@contextlib.contextmanager
def _locked_sibling(
    destination: Path, suffix: str, create: Callable[[Path], None]
) -> Iterator[Path]:
    """Create a hidden file or folder, locked as long as its writer lives, and remove stale ones."""
    name = re.escape(destination.name)
    _remove_stale(destination.parent, rf"\.{name}\.[0-9a-f]{{8}}{re.escape(suffix)}")
    while True:
        temporary = _sibling(destination, suffix)
        create(temporary)
        lock = _lock(temporary)
        if temporary.exists():
            break
        _unlock(lock)  # Another process has just taken it for stale.
    try:
        yield temporary
    finally:
        _unlock(lock)


def _sibling(destination: Path, suffix: str) -> Path:
    return destination.with_name(f".{destination.name}.{secrets.token_hex(4)}{suffix}")


def _remove_stale(folder: Path, pattern: str) -> None:
    """Remove what matches and whose writer has ended, so that nobody holds its lock."""
    with contextlib.suppress(OSError):
        for path in folder.iterdir():
            if not re.fullmatch(pattern, path.name):
                continue
            if fcntl is None:
                # Windows has no such locks, but does not remove what is open or loaded. A new
                # folder may not hold its file yet.
                age = time.time() - path.lstat().st_mtime
                if path.name.startswith(f"{_TEMPORARY}{CODE}") and age > _NEW_SECONDS:
                    shutil.rmtree(path, ignore_errors=True)
                continue
            if path.lstat().st_uid != os.getuid():
                continue
            lock = _lock(path, wait=False)
            if lock is None:
                continue
            try:
                path.unlink() if path.is_file() else shutil.rmtree(path, ignore_errors=True)
            finally:
                _unlock(lock)


def _lock(path: Path, *, wait: bool = True) -> int | None:
    """Lock a file or folder; None if it is locked, or the system or file system has no locks."""
    if fcntl is None:
        return None
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def _is_open_as(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _unlock(lock: int | None) -> None:
    if lock is not None:
        os.close(lock)


def _flush(path: Path) -> None:
    """Write a file to disk, so that a full disk raises before the rename."""
    with path.open("r+b") as stream:  # Windows needs the permission to write.
        os.fsync(stream.fileno())


def _replace(temporary: Path, destination: Path) -> None:
    if not destination.exists():
        temporary.rename(destination)
        return
    with kept_folder(destination):
        if _exchange(temporary, destination):
            return  # `temporary` is now the old folder, which the caller removes
        old = _sibling(destination, _OLD)
        destination.rename(old)
        try:
            temporary.rename(destination)
        except BaseException:
            old.rename(destination)
            raise
    shutil.rmtree(old, ignore_errors=True)


def _exchange(first: Path, second: Path) -> bool:
    """Exchange two names atomically; return False if the system does not support it."""
    if os.name == "nt":
        return False
    library = ctypes.CDLL(None, use_errno=True)
    names = os.fsencode(first), os.fsencode(second)
    if hasattr(library, "renameat2"):
        result = library.renameat2(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE)
    elif hasattr(library, "renamex_np"):  # On macOS.
        result = library.renamex_np(*names, _RENAME_EXCHANGE)
    else:
        return False
    if result == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS, errno.EXDEV, errno.ENOTSUP):
        return False
    raise OSError(code, os.strerror(code), str(second))
