"""Peak memory of an encoder, each contestant in a process of its own."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import ClassVar, Final

from dcnv3_tvm.bench.alone import AloneError
from dcnv3_tvm.bench.cases import EncoderCase
from dcnv3_tvm.bench.contestants import OURS, Peer, absent
from dcnv3_tvm.bench.deployed import Deployed
from dcnv3_tvm.bench.listing import Listing
from dcnv3_tvm.provenance import Provenance

CALLS: Final = 3
"""Calls of the model: some runtimes set memory aside only after the first."""


@dataclasses.dataclass(frozen=True)
class MemoryRow:
    """One contestant.

    Parameters
    ----------
    contestant : str
        Its name.
    bytes : int or None
        Peak resident memory of its process; None where it failed.
    ratio : float or None
        That over this library's.
    error : float or None
        Of its outputs, in the measure of the case.
    wrong : bool
        Whether that is too much.
    failure : str or None
        Why there is no number.
    """

    contestant: str
    bytes: int | None = None
    ratio: float | None = None
    error: float | None = None
    wrong: bool = False
    failure: str | None = None


@dataclasses.dataclass(frozen=True)
class MemoryListing(Listing[MemoryRow]):
    """All contestants, this library first."""

    KIND: ClassVar[str] = "memory"
    HEADER: ClassVar[tuple[str, ...]] = ("", "peak, MB", "against ours", "error")

    @property
    def ok(self) -> bool:
        """Whether no output was wrong."""
        return not any(row.wrong for row in self.rows)

    def cells(self) -> list[tuple[str, ...]]:
        """Return the rows of a table for people, under `HEADER`."""
        return [
            (
                row.contestant,
                row.failure or f"{(row.bytes or 0) / 1e6:8.1f}",
                "" if row.ratio is None else f"{row.ratio:6.2f}x",
                "" if row.error is None else f"{row.error:.1e}{' WRONG' * row.wrong}",
            )
            for row in self.rows
        ]


def measure_memory(
    case: EncoderCase,
    *,
    against: Sequence[Peer] = (),
    threads: int,
    on_step: Callable[[str], None] = lambda _: None,
) -> MemoryListing:
    """Run each contestant in a fresh process, as its users deploy it.

    This library loads an artifact, without PyTorch and without the compiler; ONNX Runtime and
    OpenVINO read an exported file, without PyTorch; PyTorch loads a pickled module. What was
    needed to make these files does not count.

    Parameters
    ----------
    case : EncoderCase
        The encoder.
    against : sequence of Peer
        Whom to compare with.
    threads : int
        To compute with.
    on_step : callable
        Called with what happens next.
    """
    rows: list[MemoryRow] = []
    with tempfile.TemporaryDirectory(prefix="dcnv3-tvm-bench-") as folder:
        on_step(f"{case.slug}: inputs and reference")
        deployed = Deployed(case, Path(folder), threads)
        tolerances = {OURS: deployed.problem.tolerance}
        tolerances |= {peer.name: peer.tolerance for peer in against}
        skipped = absent(against)
        for name, tolerance in tolerances.items():
            on_step(f"{case.slug}: {name}")
            if name in skipped:
                rows.append(MemoryRow(name, failure=skipped[name]))
                continue
            try:
                answer, error = deployed.run("peak_memory", name, calls=CALLS)
            except AloneError as failed:
                if name == OURS:
                    raise
                rows.append(MemoryRow(name, failure=str(failed.got)))
                continue
            peak, wrong = answer["bytes"], not error <= tolerance
            ours = rows[0].bytes if rows else peak
            rows.append(MemoryRow(name, peak, peak / (ours or peak), error, wrong))
    return MemoryListing(
        slug=case.slug,
        provenance=Provenance.here(threads),
        how=f"Peak resident memory (VmHWM) of a process that opens the model and calls it {CALLS} "
        "times, its imports included.",
        rows=tuple(rows),
    )
