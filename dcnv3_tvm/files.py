"""Write files and folders atomically, and compute their digests."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from dcnv3_tvm.errors import DCNv3Error

_AT_FDCWD: Final = -100
_RENAME_EXCHANGE: Final = 2


def temporary_folder(purpose: str = "") -> tempfile.TemporaryDirectory[str]:
    """Create a folder that is removed with the returned object, or at the end of a ``with`` block.

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
        return tempfile.TemporaryDirectory(prefix=f"dcnv3-tvm-{purpose}")
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
    temporary = _sibling(destination)
    try:
        temporary.mkdir()
        yield temporary
        for path in sorted(temporary.rglob("*")):
            if path.is_file():
                _flush(path)
        _replace(temporary, destination)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


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
    """Write a file to disk, so that a full disk raises before the rename."""
    with path.open("rb") as stream:
        os.fsync(stream.fileno())


def _replace(temporary: Path, destination: Path) -> None:
    if not destination.exists():
        temporary.rename(destination)
        return
    if _exchange(temporary, destination):
        return  # `temporary` is now the old folder, which the caller removes
    old = _sibling(destination)
    destination.rename(old)
    try:
        temporary.rename(destination)
    except BaseException:
        old.rename(destination)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _exchange(first: Path, second: Path) -> bool:
    """Exchange two names atomically; return False if the system does not support it."""
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
