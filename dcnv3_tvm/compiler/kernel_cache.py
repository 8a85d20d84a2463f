"""Keep compiled kernels on disk, for later processes.

One file a kernel, named by a digest of everything that determines its code. It holds the digest of
the rest, one line of JSON and a shared library. Whatever fails, the kernel is compiled as without a
cache: a file that is damaged is ignored and replaced, and one that cannot be written is not kept.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from dcnv3_tvm import files
from dcnv3_tvm.environment import DCNV3_TVM_CACHE, XDG_CACHE_HOME

LIMIT: Final = 256_000_000
"""Bytes of all entries, above which the least recently used are removed; one takes some 30 KB."""

OFF: Final = "off"
"""Value of the environment variable that disables the cache."""

_SUFFIX: Final = ".kernel"
_DIGEST_BYTES: Final = hashlib.sha256().digest_size


@dataclasses.dataclass(frozen=True)
class CachedKernel:
    """An entry of the cache.

    Parameters
    ----------
    about : dict
        Description of the kernel, JSON values.
    code : bytes
        A shared library.
    """

    about: Mapping[str, Any]
    code: bytes


def cache_folder() -> Path | None:
    """Return the folder of the cache, which may not exist; None if there is no cache."""
    chosen = DCNV3_TVM_CACHE.value
    if chosen == OFF:
        return None
    if chosen:
        return Path(chosen)
    base = Path(XDG_CACHE_HOME.value or "")
    if not base.is_absolute():  # As the XDG specification demands.
        try:
            base = Path.home() / ".cache"
        except RuntimeError:  # The user has no home.
            return None
    return base / "dcnv3-tvm"


def used_bytes() -> int:
    """Return the size of all entries."""
    return sum(status.st_size for _, status in _entries(cache_folder()))


def read(key: str) -> CachedKernel | None:
    """Return the entry of a key, or None.

    Parameters
    ----------
    key : str
        A digest, in hexadecimal.
    """
    folder = cache_folder()
    if folder is None:
        return None
    path = folder / f"{key}{_SUFFIX}"
    try:
        with path.open("rb") as stream:
            # What another user wrote is not executed. Windows keeps users apart by folders.
            if os.name != "nt" and os.fstat(stream.fileno()).st_uid not in (0, os.getuid()):
                return None
            digest, content = stream.read(_DIGEST_BYTES), stream.read()
    except OSError:
        return None
    if hashlib.sha256(content).digest() != digest:
        return None
    with contextlib.suppress(OSError):
        os.utime(path)  # It is the most recently used one.
    about, _, code = content.partition(b"\n")
    return CachedKernel(json.loads(about), code)


def write(key: str, kernel: CachedKernel) -> None:
    """Keep a kernel, and remove the least recently used ones above `LIMIT`.

    Parameters
    ----------
    key : str
        As for `read`.
    kernel : CachedKernel
        The entry.
    """
    folder = cache_folder()
    if folder is None:
        return
    content = json.dumps(kernel.about).encode() + b"\n" + kernel.code
    with contextlib.suppress(OSError):  # A full or read-only disk.
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with files.atomic_file(folder / f"{key}{_SUFFIX}") as temporary:
            temporary.write_bytes(hashlib.sha256(content).digest() + content)
        _evict(folder)


def _evict(folder: Path) -> None:
    entries = sorted(_entries(folder), key=lambda entry: entry[1].st_mtime_ns)
    excess = sum(status.st_size for _, status in entries) - LIMIT
    for path, status in entries:
        if excess <= 0:
            return
        path.unlink(missing_ok=True)
        excess -= status.st_size


def _entries(folder: Path | None) -> list[tuple[Path, os.stat_result]]:
    """List the files of the cache, with those that a killed process left behind."""
    found = []
    with contextlib.suppress(OSError):
        for path in folder.iterdir() if folder is not None else ():
            if path.suffix == _SUFFIX:
                with contextlib.suppress(FileNotFoundError):  # Another process has removed it.
                    found.append((path, path.stat()))
    return found
