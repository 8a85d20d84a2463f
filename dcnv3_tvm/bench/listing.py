"""What the reports on a single case have in common: rows under a header, as JSON and as CSV."""

from __future__ import annotations

import csv
import dataclasses
import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Final, Generic, TypeVar

from dcnv3_tvm.provenance import Provenance

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

SCHEMA: Final = 1
"""Version of the JSON; raised when a reader of the old one would go wrong."""

RowT = TypeVar("RowT", bound="DataclassInstance")


@dataclasses.dataclass(frozen=True)
class Listing(Generic[RowT]):
    """One case, measured part by part or in several ways.

    Parameters
    ----------
    slug : str
        Name of the case.
    provenance : Provenance
        Machine, versions, date.
    how : str
        What the numbers are, for people.
    rows : tuple of dataclass
        What was measured.
    """

    KIND: ClassVar[str]
    HEADER: ClassVar[tuple[str, ...]]

    slug: str
    provenance: Provenance
    how: str
    rows: tuple[RowT, ...]

    @property
    def ok(self) -> bool:
        """Whether nothing was wrong."""
        return True

    def cells(self) -> list[tuple[str, ...]]:
        """Return the rows of a table for people, under `HEADER`."""
        raise NotImplementedError

    def summary(self) -> list[str]:
        """Return lines to show below the table."""
        return []

    def to_json(self) -> dict[str, Any]:
        """Return plain values for ``json.dumps``."""
        return {"schema": SCHEMA, "kind": self.KIND} | dataclasses.asdict(self)

    def to_csv(self) -> str:
        """Return one line for each row."""
        where = {"case": self.slug} | self.provenance.columns()
        rows = [dataclasses.asdict(row) | where for row in self.rows]
        return csv_text(rows)


def csv_text(rows: Sequence[Mapping[str, Any]], fields: Sequence[str] | None = None) -> str:
    """Write rows as CSV, with the fields of the first unless others are given."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]) if fields is None else fields, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
