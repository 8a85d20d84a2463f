"""Measurement context: what the times of a work directory depend on."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Final

from tvm.target import Target

from dcnv3_tvm import files
from dcnv3_tvm.errors import TuningError
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
        TuningError
            If the directory belongs to another context, or cannot be read or written.
        """
        path = directory / _FILE
        try:
            directory.mkdir(parents=True, exist_ok=True)
            if not path.exists():
                with files.atomic_file(path) as temporary:
                    temporary.write_text(json.dumps(dataclasses.asdict(self), indent=2))
            existing = MeasurementContext(**json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise TuningError("the work directory cannot be used", got=error) from error
        if existing != self:
            raise TuningError(
                "the times in the work directory are not comparable with those of this session",
                got=existing,
                allowed=self,
                hint="Choose another --work-dir.",
            )
