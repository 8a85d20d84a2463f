"""Write files and folders atomically, and compute their digests."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Final

_AT_FDCWD: Final = -100
_RENAME_EXCHANGE: Final = 2


@contextlib.contextmanager
def atomic_folder(destination: Path) -> Iterator[Path]:
    """Yield a temporary folder that becomes `destination` when the block ends well.

    Whatever ends the block early (a full or read-only disk, Ctrl-C, any error) removes the
    temporary folder and leaves what was at `destination` as it was. A folder at `destination` is
    replaced in one step where the file system can exchange two names.

    Parameters
    ----------
    destination : Path
        The temporary folder is made beside it, hidden; missing parents are made.

    Raises
    ------
    OSError
        If something cannot be written.
    """
    destination = destination.absolute()
    destination.parent.mkdir(parents=True, exist_ok=True)
    temporary = _sibling(destination)
    try:
        temporary.mkdir()
        yield temporary
        for path in sorted(temporary.rglob("*")):
            if path.is_file():
                _flush(path)
        _put_in_place(temporary, destination)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def atomic_file(destination: Path) -> Iterator[Path]:
    """Yield a temporary path whose file becomes `destination` when the block ends well.

    Parameters
    ----------
    destination : Path
        The temporary file is made beside it, with the same ending.

    Raises
    ------
    OSError
        If something cannot be written.
    """
    destination = destination.absolute()
    temporary = _sibling(destination).with_suffix(destination.suffix)
    try:
        yield temporary
        _flush(temporary)
        os.replace(temporary, destination)
    finally:
        temporary.unlink(missing_ok=True)


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()


def _sibling(destination: Path) -> Path:
    return destination.with_name(f".{destination.name}.{secrets.token_hex(4)}.tmp")


def _flush(path: Path) -> None:
    """Make the disk say now, not after the rename, that it is full."""
    with path.open("rb") as stream:
        os.fsync(stream.fileno())


def _put_in_place(temporary: Path, destination: Path) -> None:
    if not destination.exists():
        temporary.rename(destination)
        return
    if _exchange(temporary, destination):
        return  # `temporary` now holds the old folder, and the caller removes it
    old = _sibling(destination)
    destination.rename(old)
    try:
        temporary.rename(destination)
    except BaseException:
        old.rename(destination)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _exchange(first: Path, second: Path) -> bool:
    """Exchange two names in one step; False where the system cannot."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    result = renameat2(
        _AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE
    )
    if result == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS, errno.EXDEV, errno.ENOTSUP):
        return False
    raise OSError(code, os.strerror(code), str(second))
