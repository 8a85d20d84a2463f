"""Append-only JSON-lines file of all trials of a tuning session."""

from __future__ import annotations

import fcntl
import json
import math
import os
from pathlib import Path
from typing import Any, TypedDict

from dcnv3_tvm.errors import InvalidArgumentError, TuningError
from dcnv3_tvm.json_values import decode
from dcnv3_tvm.schedules.space import Decision
from dcnv3_tvm.tuning.tasks import Candidate


class TrialLog:
    """A JSON-lines file with a single writing process.

    Parameters
    ----------
    path : Path
        The file; it is created if missing. An incomplete last line, left by a killed process, is
        truncated.

    Attributes
    ----------
    entries : list of dict
        All lines of the file, those of earlier sessions included.

    Raises
    ------
    TuningError
        If another process has the file open.
    InvalidArgumentError
        If it cannot be read or written, or a line is invalid.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        except OSError as error:
            raise InvalidArgumentError(
                "the work directory is not writable", got=f"{error.strerror} ({path})"
            ) from error
        try:
            self._lock()
            self.entries = self._read()
        except BaseException:
            os.close(self._file)
            raise

    def append(self, entry: dict[str, Any]) -> None:
        """Append a line.

        Raises
        ------
        TuningError
            If the line cannot be written completely, for example because the disk is full; the
            file then ends with the previous line.
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
            raise TuningError(
                "a trial cannot be written",
                got=f"{problem} ({self._path})",
                hint="All earlier trials are saved: free some space and rerun the same command.",
            )
        self.entries.append(entry)

    def add_trial(self, candidate: Candidate, seconds: float | None, error: str) -> None:
        """Append a trial: its time, or None and a description of the error.

        Raises
        ------
        TuningError
            As for `append`.
        """
        self.append(
            {
                "workload": candidate.task.workload,
                "decisions": candidate.decisions,
                "seconds": seconds,
                "error": error,
            }
        )

    def close(self) -> None:
        """Close the file and release its lock."""
        os.close(self._file)

    def __enter__(self) -> TrialLog:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise TuningError(
                "another tuning session is using this work directory",
                got=self._path.parent,
                hint="Wait for it to finish, stop it, or choose another --work-dir.",
            ) from error

    def _read(self) -> list[dict[str, Any]]:
        content = self._path.read_bytes()
        complete = content.rfind(b"\n") + 1
        if complete < len(content):
            os.ftruncate(self._file, complete)
        try:
            return [_trial(line) for line in content[:complete].splitlines()]
        except (ValueError, RecursionError) as error:
            raise InvalidArgumentError(
                "the trial log has an invalid line",
                got=f"{self._path}: {error}",
                hint="Remove that line, or choose another --work-dir.",
            ) from error


class _Trial(TypedDict):
    """A line of the file."""

    workload: str
    decisions: dict[str, Decision]
    seconds: float | None
    error: str


def _trial(line: bytes) -> dict[str, Any]:
    trial: dict[str, Any] = decode(_Trial, json.loads(line), "trial")
    if trial["seconds"] is not None and not 0 < trial["seconds"] < math.inf:
        raise ValueError("seconds is not a positive number")
    return trial
