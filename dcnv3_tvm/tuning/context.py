"""Measurement context: what the times of a work directory depend on."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Final

from tvm.target import Target

from dcnv3_tvm import files
from dcnv3_tvm.errors import InvalidArgumentError
from dcnv3_tvm.json_values import decode
from dcnv3_tvm.schedules.records import tvm_version
from dcnv3_tvm.targets import target_slug

_FILE: Final = "session.json"


@dataclasses.dataclass(frozen=True)
class MeasurementContext:
    """Target, hardware and TVM version; times of different contexts are not comparable.

    Parameters
    ----------
    target : str
        Slug of the target.
    hardware : str
        Description of the device.
    cores : int
        Number of CPU cores that compute.
    tvm : str
        Version of apache-tvm.
    """

    target: str
    hardware: str
    cores: int
    tvm: str

    @classmethod
    def of(cls, target: Target, *, hardware: str, cores: int) -> MeasurementContext:
        """Return the context of the installed TVM."""
        return cls(target_slug(target), hardware, cores, tvm_version())

    def bind(self, directory: Path) -> None:
        """Create a work directory for this context, or check that an existing one belongs to it.

        Raises
        ------
        InvalidArgumentError
            If the directory belongs to another context, holds something else, or cannot be read or
            written.
        """
        check_work_directory(directory)
        path = directory / _FILE
        try:
            directory.mkdir(parents=True, exist_ok=True)
            if not path.exists():
                with files.atomic_file(path) as temporary:
                    temporary.write_text(json.dumps(dataclasses.asdict(self), indent=2))
            text = path.read_text(encoding="utf-8")
            existing = decode(MeasurementContext, json.loads(text), _FILE)
        except (OSError, ValueError, RecursionError) as error:
            raise _unusable(error) from error
        if existing != self:
            raise InvalidArgumentError(
                "the times in the work directory are not comparable with those of this session",
                got=existing,
                allowed=self,
                hint="Choose another --work-dir.",
            )


def check_work_directory(directory: Path) -> None:
    """Check that a directory is new, empty, or that of a session.

    Raises
    ------
    InvalidArgumentError
        If it holds something else, or cannot be read.
    """
    try:
        names = [entry.name for entry in directory.iterdir()]
    except FileNotFoundError:
        return
    except OSError as error:
        raise _unusable(error) from error
    if _FILE not in names and any(not name.startswith(f".{_FILE}.") for name in names):
        raise InvalidArgumentError(
            "the work directory holds something other than a tuning session",
            got=directory,
            hint="Choose a new or an empty folder.",
        )


def _unusable(error: Exception) -> InvalidArgumentError:
    return InvalidArgumentError(
        "the work directory cannot be used", got=error, hint="Choose another --work-dir."
    )
