"""Every trial of a session, kept the moment it is known: a file of JSON lines that only grows."""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path
from typing import Any

from dcnv3_tvm.errors import DCNv3Error


class SessionError(DCNv3Error):
    """A tuning session cannot start or go on; what was measured is kept."""


class Journal:
    """A file of JSON lines, to which one process at a time appends.

    Parameters
    ----------
    path : Path
        The file; it is made if it is not there. A last line that was not written to its end, by a
        process that was killed, is cut off.

    Raises
    ------
    SessionError
        If another process has it open, it cannot be read or written, or a line of it is damaged.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        except OSError as error:
            raise SessionError(
                "the work directory cannot be written", got=f"{error.strerror} ({path})"
            ) from error
        try:
            self._lock()
            self.entries = self._read()
        except BaseException:
            os.close(self._file)
            raise

    def append(self, entry: dict[str, Any]) -> None:
        """Add a line.

        Raises
        ------
        SessionError
            If it cannot be written as a whole, for example because the disk is full; then none of
            it is.
        """
        line = (json.dumps(entry) + "\n").encode()
        size = os.fstat(self._file).st_size
        try:
            written = os.write(self._file, line)
            problem = None if written == len(line) else "the disk is full"
        except OSError as error:
            problem = error.strerror or str(error)
        if problem is not None:
            os.ftruncate(self._file, size)
            raise SessionError(
                "a trial cannot be kept",
                got=f"{problem} ({self._path})",
                hint="All trials before it are kept: make room, and start the same command again.",
            )
        self.entries.append(entry)

    def close(self) -> None:
        """Close the file, and let others have it."""
        os.close(self._file)

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise SessionError(
                "another session is at work in this directory",
                got=self._path.parent,
                hint="Wait for it, stop it, or choose another --work-dir.",
            ) from error

    def _read(self) -> list[dict[str, Any]]:
        content = self._path.read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            os.ftruncate(self._file, whole)
        try:
            return [json.loads(line) for line in content[:whole].splitlines()]
        except ValueError as error:
            raise SessionError(
                "the session's list of trials is damaged",
                got=f"{self._path}: {error}",
                hint="Remove the damaged line, or choose another --work-dir.",
            ) from error
