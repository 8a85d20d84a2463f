"""Results as data: JSON, CSV, and rows of a table."""

from __future__ import annotations

import dataclasses
from typing import Any, Final

from dcnv3_tvm.bench.contestants import MAX, OURS
from dcnv3_tvm.bench.floors import Floors, Peaks
from dcnv3_tvm.bench.listing import SCHEMA, csv_text
from dcnv3_tvm.bench.measure import Plan, Quartiles
from dcnv3_tvm.provenance import Provenance

TABLE_HEADER: Final = ("", "ms", "quartiles", "best", "against ours", "quartiles", "error")


@dataclasses.dataclass(frozen=True)
class Row:
    """One contestant in one case.

    Parameters
    ----------
    name : str
        The contestant.
    error : float or None
        Largest error, in the measure of the case; None where it gave no output.
    tolerance : float or None
        What the error may be.
    seconds : Quartiles or None
        Of a call; None where it was not timed.
    ratio : Quartiles or None
        Its time over that of this library.
    redone : int
        Bursts that were taken once more.
    failure : str or None
        Why it gave no output.
    peak_bytes : int or None
        Memory it takes on a GPU.
    """

    name: str
    error: float | None = None
    tolerance: float | None = None
    seconds: Quartiles | None = None
    ratio: Quartiles | None = None
    redone: int = 0
    failure: str | None = None
    peak_bytes: int | None = None

    @property
    def wrong(self) -> bool:
        """Whether its outputs are not the true ones."""
        if self.error is None or self.tolerance is None:
            return False
        return not self.error <= self.tolerance


@dataclasses.dataclass(frozen=True)
class CaseResult:
    """All contestants in one case.

    Parameters
    ----------
    slug : str
        Name of the case.
    floors : Floors
        Least times.
    rows : tuple of Row
        In the order of the turns, this library first.
    measure : str
        How errors are measured: ``"max"`` or ``"norm"``, see `error_of`.
    """

    slug: str
    floors: Floors
    rows: tuple[Row, ...]
    measure: str = MAX

    @property
    def wrong(self) -> list[str]:
        """Names of contestants with wrong outputs."""
        return [row.name for row in self.rows if row.wrong]


@dataclasses.dataclass(frozen=True)
class Report:
    """A run of the benchmark.

    Parameters
    ----------
    kind : str
        ``"op"`` or ``"encoder"``.
    provenance : Provenance
        Machine, versions, date.
    plan : Plan
        How often was called.
    peaks : Peaks
        Rates the floors are computed from.
    cases : tuple of CaseResult
        What was measured.
    skipped : dict of str to str
        Peers that were asked for and not measured, and why.
    """

    kind: str
    provenance: Provenance
    plan: Plan
    peaks: Peaks
    cases: tuple[CaseResult, ...]
    skipped: dict[str, str]

    @property
    def ok(self) -> bool:
        """Whether no output was wrong."""
        return not any(case.wrong for case in self.cases)

    def to_json(self) -> dict[str, Any]:
        """Return plain values for ``json.dumps``; NaN becomes None with ``wrong`` set."""
        data = {"schema": SCHEMA} | dataclasses.asdict(self)
        for case, plain in zip(self.cases, data["cases"], strict=True):
            for row, values in zip(case.rows, plain["rows"], strict=True):
                values["wrong"] = row.wrong
                if row.error is not None and row.error != row.error:
                    values["error"] = None
        return data

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Report:
        """Read back what `to_json` gave."""
        return cls(
            kind=data["kind"],
            provenance=Provenance(**data["provenance"]),
            plan=Plan(**data["plan"]),
            peaks=Peaks(**data["peaks"]),
            cases=tuple(_case(case) for case in data["cases"]),
            skipped=data["skipped"],
        )

    def to_csv(self) -> str:
        """Return one line for each contestant and case, times in milliseconds."""
        rows = [self._csv_row(case, row) for case in self.cases for row in case.rows]
        return csv_text(rows, CSV_FIELDS)

    def _csv_row(self, case: CaseResult, row: Row) -> dict[str, Any]:
        values: dict[str, Any] = {
            "case": case.slug,
            "contestant": row.name,
            "error": row.error,
            "wrong": row.wrong,
            "failure": row.failure,
            "peak_bytes": row.peak_bytes,
            "copy_floor_ms": 1e3 * case.floors.copy,
            "arithmetic_floor_ms": 1e3 * case.floors.arithmetic,
        } | self.provenance.columns()
        if row.seconds is not None:
            times = dataclasses.asdict(row.seconds.scaled(1e3))
            values |= {f"{name}_ms": time for name, time in times.items()}
        if row.ratio is not None:
            values["ratio"] = row.ratio.median
        return values


CSV_FIELDS: Final = (
    "case",
    "contestant",
    "median_ms",
    "lower_ms",
    "upper_ms",
    "best_ms",
    "ratio",
    "error",
    "wrong",
    "failure",
    "peak_bytes",
    "copy_floor_ms",
    "arithmetic_floor_ms",
    "date",
    "commit",
    "cpu",
    "cores",
    "threads",
    "versions",
    "gpu",
    "driver",
)
"""Columns of the CSV."""


def table_rows(case: CaseResult) -> list[tuple[str, ...]]:
    """Return the rows of a table for people, under `TABLE_HEADER`; the floors last."""
    rows: list[tuple[str, ...]] = []
    for row in case.rows:
        error = "" if row.error is None else f"{row.error:.1e}"
        if row.failure is not None:
            rows.append((row.name, row.failure, "", "", "", "", ""))
        elif row.wrong:
            rows.append((row.name, "WRONG", "", "", "", "", f"{error} > {row.tolerance:.1e}"))
        elif row.seconds is None:
            rows.append((row.name, "not timed", "", "", "", "", error))
        else:
            times, ratio = row.seconds.scaled(1e3), row.ratio
            compared = ("", "")
            if ratio is not None and row.name != OURS:
                compared = (f"{ratio.median:8.2f}x", f"{ratio.lower:.2f} to {ratio.upper:.2f}")
            spread = f"{times.lower:.4f} to {times.upper:.4f}"
            rows.append(
                (row.name, f"{times.median:9.4f}", spread, f"{times.best:9.4f}", *compared, error)
            )
    for name, seconds in dataclasses.asdict(case.floors).items():
        rows.append((f"floor: {name}", f"{1e3 * seconds:9.4f}", "", "", "", "", ""))
    return rows


def _case(data: dict[str, Any]) -> CaseResult:
    return CaseResult(
        slug=data["slug"],
        floors=Floors(**data["floors"]),
        rows=tuple(_row(row) for row in data["rows"]),
        # Written since there is more than one.
        measure=data.get("measure", MAX),
    )


def _row(data: dict[str, Any]) -> Row:
    values = {name: value for name, value in data.items() if name != "wrong"}
    for name in ("seconds", "ratio"):
        if values[name] is not None:
            values[name] = Quartiles(**values[name])
    if data["wrong"] and values["error"] is None:
        values["error"] = float("nan")
    return Row(**values)
