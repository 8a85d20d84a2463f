"""Digests of files, computed in parallel.

A digest is the SHA-256 of the SHA-256 of each part of 16 MiB; that of a file of one part is its
plain SHA-256.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

from dcnv3_tvm.machine import usable_cores

PART: Final = 1 << 24
"""Bytes of a part."""


def digest_of(content: memoryview) -> str:
    """Return the digest of bytes in memory, in hexadecimal."""
    return _digest(len(content), lambda start: content[start : start + PART])


def digest_of_file(path: Path) -> str:
    """Return the digest of a file, in hexadecimal.

    Raises
    ------
    OSError
        If it cannot be read.
    """

    def read(start: int) -> bytes:
        with path.open("rb") as stream:
            stream.seek(start)
            return stream.read(PART)

    return _digest(os.stat(path).st_size, read)


def _digest(size: int, part: Callable[[int], bytes | memoryview]) -> str:
    if size <= PART:
        return hashlib.sha256(part(0)).hexdigest()
    with ThreadPoolExecutor(len(usable_cores())) as pool:
        parts = pool.map(lambda start: hashlib.sha256(part(start)).digest(), range(0, size, PART))
        return hashlib.sha256(b"".join(parts)).hexdigest()
