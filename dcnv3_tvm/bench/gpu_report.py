"""What a run on a GPU gives back."""

from __future__ import annotations

import dataclasses
from typing import Any

from dcnv3_tvm.bench.contestants import OURS
from dcnv3_tvm.bench.listing import SCHEMA
from dcnv3_tvm.bench.report import Report
from dcnv3_tvm.provenance import Provenance


@dataclasses.dataclass(frozen=True)
class GpuRun:
    """What a run has measured.

    Parameters
    ----------
    provenance : Provenance
        Machine, GPU, versions, date.
    reports : dict of str to Report
        By name of their files.
    skipped : dict of str to str
        What was not measured, and why.
    seconds : float
        That it took.
    """

    provenance: Provenance
    reports: dict[str, Report]
    skipped: dict[str, str]
    seconds: float

    @property
    def ok(self) -> bool:
        """Whether this library gave the right outputs wherever it was asked."""
        rows = (
            row for report in self.reports.values() for case in report.cases for row in case.rows
        )
        return not any(row.name.startswith(OURS) and (row.wrong or row.failure) for row in rows)

    def to_json(self) -> dict[str, Any]:
        """Return plain values for ``json.dumps``."""
        return {
            "schema": SCHEMA,
            "kind": "gpu",
            "provenance": self.provenance.to_json(),
            "seconds": self.seconds,
            "reports": {name: report.to_json() for name, report in self.reports.items()},
            "skipped": self.skipped,
        }


@dataclasses.dataclass(frozen=True)
class Compilation:
    """What was compiled ahead.

    Parameters
    ----------
    target : str
        The GPU.
    compiled : tuple of str
        Names of operators and encoders.
    failed : dict of str to str
        Those that could not be compiled, and why.
    """

    target: str
    compiled: tuple[str, ...]
    failed: dict[str, str]

    @property
    def ok(self) -> bool:
        """Whether none failed."""
        return not self.failed

    def to_json(self) -> dict[str, Any]:
        """Return plain values for ``json.dumps``."""
        return dataclasses.asdict(self)
