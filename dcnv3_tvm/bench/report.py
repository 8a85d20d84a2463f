"""Reports of benchmarks, as text tables and as JSON."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any, ClassVar, Final, Generic, TypeVar

from dcnv3_tvm.bench.backends import OURS
from dcnv3_tvm.bench.measure import Plan, Quartiles
from dcnv3_tvm.bench.roofline import Peaks, Roofline
from dcnv3_tvm.errors import first_line
from dcnv3_tvm.provenance import Provenance
from dcnv3_tvm.verify.tolerances import MAX_ERROR

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

SCHEMA: Final = 2
"""Version of the JSON, increased by incompatible changes."""

TABLE_HEADER: Final = ("", "ms", "quartiles", "best", "vs ours", "quartiles", "error")

_LONGEST_FAILURE: Final = 160

RowT = TypeVar("RowT", bound="DataclassInstance")


@dataclasses.dataclass(frozen=True)
class BackendRow:
    """Result of one backend in one case.

    Parameters
    ----------
    name : str
        Name of the backend.
    error : float or None
        Largest error, in the error measure of the case; None without outputs.
    tolerance : float or None
        Largest accepted error.
    seconds : Quartiles or None
        Time of a call; None if it was not timed.
    ratio : Quartiles or None
        Time divided by that of this library.
    redone : int
        Number of repeated bursts.
    failure : str or None
        Why there are no outputs.
    peak_bytes : int or None
        Peak memory of the GPU, or of a process that trains.
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
        """Whether the error exceeds the tolerance or is NaN."""
        if self.error is None or self.tolerance is None:
            return False
        return not self.error <= self.tolerance


@dataclasses.dataclass(frozen=True)
class CaseResult:
    """Results of all backends in one case.

    Parameters
    ----------
    slug : str
        Name of the case.
    roofline : Roofline
        Lower bounds of the time.
    rows : tuple of BackendRow
        Results, this library first.
    measure : str
        Error measure, see `dcnv3_tvm.verify.tolerances`.
    """

    slug: str
    roofline: Roofline
    rows: tuple[BackendRow, ...]
    measure: str = MAX_ERROR

    @property
    def wrong(self) -> list[str]:
        """Names of the backends with wrong outputs."""
        return [row.name for row in self.rows if row.wrong]


@dataclasses.dataclass(frozen=True)
class Report:
    """Results of a benchmark run.

    Parameters
    ----------
    kind : str
        ``"op"``, ``"op-backward"``, ``"encoder"`` or ``"train"``.
    provenance : Provenance
        Machine, versions and date.
    plan : Plan
        Number of timed calls.
    peaks : Peaks
        Rates of the roofline.
    cases : tuple of CaseResult
        Results by case.
    skipped : dict of str to str
        Backends that were not run, and why.
    """

    kind: str
    provenance: Provenance
    plan: Plan
    peaks: Peaks
    cases: tuple[CaseResult, ...]
    skipped: dict[str, str]

    @property
    def ok(self) -> bool:
        """Whether all outputs were correct."""
        return not any(case.wrong for case in self.cases)

    def to_json(self) -> dict[str, Any]:
        """Return plain values for ``json.dumps``; errors that are not finite become None."""
        data = {"schema": SCHEMA} | dataclasses.asdict(self)
        for case, plain in zip(self.cases, data["cases"], strict=True):
            for row, values in zip(case.rows, plain["rows"], strict=True):
                values["wrong"] = row.wrong
                if row.error is not None and not math.isfinite(row.error):
                    values["error"] = None
        return data


@dataclasses.dataclass(frozen=True)
class Listing(Generic[RowT]):
    """Measurements of one case, one per row.

    Parameters
    ----------
    slug : str
        Name of the case.
    provenance : Provenance
        Machine, versions and date.
    how : str
        How the numbers were obtained, for the text report.
    rows : tuple of dataclass
        Measurements.
    """

    KIND: ClassVar[str]
    HEADER: ClassVar[tuple[str, ...]]

    slug: str
    provenance: Provenance
    how: str
    rows: tuple[RowT, ...]

    @property
    def ok(self) -> bool:
        """Whether all outputs were correct."""
        return True

    def cells(self) -> list[tuple[str, ...]]:
        """Return the text table under `HEADER`."""
        raise NotImplementedError

    def summary(self) -> list[str]:
        """Return the lines below the table."""
        return []

    def to_json(self) -> dict[str, Any]:
        """Return plain values for ``json.dumps``."""
        return {"schema": SCHEMA, "kind": self.KIND} | dataclasses.asdict(self)


def table_rows(case: CaseResult) -> list[tuple[str, ...]]:
    """Return the text table under `TABLE_HEADER`, with the roofline last."""
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
    for name, seconds in dataclasses.asdict(case.roofline).items():
        rows.append((f"roofline: {name}", f"{1e3 * seconds:9.4f}", "", "", "", "", ""))
    return rows


def failure_text(error: Exception) -> str:
    """Return class and first line of an exception of another library."""
    return f"{type(error).__name__}: {first_line(error)[:_LONGEST_FAILURE]}"
