"""Tables of measurements of one case, with their provenance, as text and as JSON."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, ClassVar, Final, Generic, TypeVar

from dcnv3_tvm.provenance import Provenance

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

SCHEMA: Final = 2
"""Version of the JSON, increased by incompatible changes."""

RowT = TypeVar("RowT", bound="DataclassInstance")


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
