"""Load a private copy of a shared library, from memory where the system allows it.

``dlopen`` returns the earlier library for a path or a file that was loaded before, and overwriting
a file that is in use kills the process. A copy in memory needs no folder that is writable and whose
file system may hold code.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final, TypeVar

from dcnv3_tvm import files
from dcnv3_tvm.errors import ArtifactError, DCNv3Error

LoadedT = TypeVar("LoadedT")

_NAME: Final = "model.so"
_DENIALS: Final = ("failed to map segment", "cannot open shared object file")
"""Parts of messages of ``dlopen``: of a folder mounted with ``noexec``, and without ``/proc``."""

_copies = itertools.count()


def load(code: bytes, open_path: Callable[[str], LoadedT]) -> LoadedT:
    """Load a shared library by its content.

    Parameters
    ----------
    code : bytes
        Its content.
    open_path : callable
        Loads a path.

    Raises
    ------
    ArtifactError
        If neither memory nor the temporary folder may hold code.
    OSError, RuntimeError
        Of `open_path`, if the library is invalid.
    """
    try:
        with _in_memory(code) as path:
            return open_path(path)
    except (OSError, RuntimeError) as error:
        if not is_denied(error):
            raise
    try:
        with files.temporary_folder(files.CODE) as folder:
            copy = Path(folder) / _NAME
            copy.touch()
            # While it is open, another process on Windows does not remove it as left behind; a
            # later one does, because there a library in use cannot be removed.
            with copy.open("rb"):
                copy.write_bytes(code)
                return open_path(str(copy))
    except (OSError, RuntimeError, DCNv3Error) as error:
        if not isinstance(error, DCNv3Error) and not is_denied(error):
            raise
        raise ArtifactError(
            "compiled code can be loaded neither from memory nor from the temporary folder",
            got=error,
            hint="Set TMPDIR to a folder that is writable and not mounted with noexec.",
        ) from error


def is_denied(error: OSError | RuntimeError) -> bool:
    """Return whether a library may not be loaded from where it is, but may be valid."""
    if getattr(error, "winerror", None) is not None:
        return False  # Windows, which has no ``noexec``, says what is wrong with the library.
    return getattr(error, "errno", None) is not None or any(text in str(error) for text in _DENIALS)


@contextlib.contextmanager
def _in_memory(code: bytes) -> Iterator[str]:
    """Yield the path of a file in memory, which no library had before."""
    if not hasattr(os, "memfd_create"):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    with open(os.memfd_create(_NAME), "wb") as file:
        file.write(code)
        file.flush()
        # Descriptors are used again. Slashes and dots in the path do not change where it leads:
        # they write the number of the copy.
        number = f"{next(_copies):b}".replace("1", "/.").replace("0", "/")
        yield f"/proc/self/fd{number}/{file.fileno()}"
