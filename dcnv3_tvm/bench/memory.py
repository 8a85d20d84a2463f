"""Peak memory of an encoder, each backend in a process of its own."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Final

import numpy as np
import torch

from dcnv3_tvm import files, frontend
from dcnv3_tvm.bench.accuracy import largest_error
from dcnv3_tvm.bench.backends import OURS, UNTUNED, Peer, missing_packages
from dcnv3_tvm.bench.cases import EncoderCase
from dcnv3_tvm.bench.memory_worker import MemoryTask, WorkerError, run_worker
from dcnv3_tvm.bench.problems import Problem, encoder_problem
from dcnv3_tvm.bench.report import Listing
from dcnv3_tvm.compiler.compile import compile_artifact
from dcnv3_tvm.provenance import Provenance

CALLS: Final = 3
"""Calls of the model: some runtimes allocate memory only after the first."""


@dataclasses.dataclass(frozen=True)
class MemoryRow:
    """Peak memory of one backend.

    Parameters
    ----------
    backend : str
        Name of the backend.
    bytes : int or None
        Peak resident memory of its process; None if it failed.
    ratio : float or None
        Memory divided by that of this library.
    error : float or None
        Largest error, in the error measure of the problem.
    wrong : bool
        Whether the error exceeds the tolerance.
    failure : str or None
        Why there is no number.
    """

    backend: str
    bytes: int | None = None
    ratio: float | None = None
    error: float | None = None
    wrong: bool = False
    failure: str | None = None


@dataclasses.dataclass(frozen=True)
class MemoryListing(Listing[MemoryRow]):
    """Peak memory of all backends, this library first."""

    KIND: ClassVar[str] = "memory"
    HEADER: ClassVar[tuple[str, ...]] = ("", "peak, MB", "vs ours", "error")

    @property
    def ok(self) -> bool:
        """Whether all outputs were correct."""
        return not any(row.wrong for row in self.rows)

    def cells(self) -> list[tuple[str, ...]]:
        """Return the text table under `HEADER`."""
        return [
            (
                row.backend,
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
    """Run each backend in a fresh process, as its users deploy it.

    This library loads an artifact without PyTorch and without the compiler; ONNX Runtime and
    OpenVINO read an ONNX file without PyTorch; PyTorch loads a pickled module. Compiling and
    exporting do not count.

    Parameters
    ----------
    case : EncoderCase
        The encoder.
    against : sequence of Peer
        Peers; those with missing packages are skipped.
    threads : int
        Threads that compute.
    on_step : callable
        Called with a description of each step before it runs.
    """
    rows: list[MemoryRow] = []
    with files.temporary_folder("bench-") as name:
        folder = Path(name)
        on_step(f"{case.slug}: inputs and reference")
        problem = encoder_problem(case)
        inputs: dict[str, Any] = problem.inputs
        np.savez(folder / "inputs.npz", **inputs)
        ours = Peer(OURS, tolerance=problem.tolerance)
        skipped = missing_packages(against)
        for peer in (ours, *against):
            backend = peer.name
            on_step(f"{case.slug}: {backend}")
            if backend in skipped:
                rows.append(MemoryRow(backend, failure=skipped[backend]))
                continue
            task = MemoryTask(
                backend=backend,
                model=str(_model(peer, problem, folder)),
                inputs=str(folder / "inputs.npz"),
                outputs=str(folder / "outputs.npz"),
                threads=threads,
                calls=CALLS,
            )
            try:
                peak = run_worker(task)["bytes"]
            except WorkerError as failed:
                if backend == OURS:
                    raise
                rows.append(MemoryRow(backend, failure=str(failed.got)))
                continue
            with np.load(task.outputs) as file:
                outputs = [file[key] for key in file.files]
            error = largest_error(outputs, problem.reference, problem.measure)
            ratio = peak / (rows[0].bytes or peak) if rows else 1.0
            rows.append(MemoryRow(backend, peak, ratio, error, wrong=not error <= peer.tolerance))
    return MemoryListing(
        slug=case.slug,
        provenance=Provenance.here(threads),
        how=f"Peak resident memory (VmHWM) of a process that opens the model and calls it {CALLS} "
        "times, including its imports.",
        rows=tuple(rows),
    )


def _model(peer: Peer, problem: Problem, folder: Path) -> Path:
    """Write what a backend opens, and return its path."""
    if peer.form is not None:
        return problem.onnx(peer.form)
    if peer.name in (OURS, UNTUNED):
        source: Any = problem.source
        imported = frontend.import_model(source, example=tuple(problem.inputs["image"].shape))
        path = folder / peer.name
        database = "none" if peer.name == UNTUNED else "default"
        compile_artifact(imported, path, dtype=problem.dtype, database=database)
        return path
    path = folder / "module.pt"
    torch.save(problem.module, path)
    return path
