"""A model of what an encoder costs on a GPU: every kernel's floor, with no GPU at hand."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable
from typing import ClassVar

import numpy as np
import torch

from dcnv3_tvm import frontend, targets
from dcnv3_tvm.bench.cases import EncoderCase
from dcnv3_tvm.bench.device_models import DeviceModel
from dcnv3_tvm.bench.floors import Floors, Peaks
from dcnv3_tvm.bench.kernels import work_of
from dcnv3_tvm.bench.listing import Listing
from dcnv3_tvm.compiler import pipeline
from dcnv3_tvm.compiler.kernel_listing import Kernel, called_kernels
from dcnv3_tvm.frontend.models.internimage import InternImage
from dcnv3_tvm.provenance import Provenance


@dataclasses.dataclass(frozen=True)
class FloorRow:
    """A kernel, or several together.

    Parameters
    ----------
    kernel : str
        Its name; of several, what they have in common.
    kind : str
        What it computes.
    calls : int
        In a call of the model.
    flops, bytes : int
        Multiplications and additions, and bytes moved, of all calls.
    memory, arithmetic : float
        Least seconds of all calls, by either.
    seconds : float
        The larger of the two for each kernel, of all calls.
    bound : str
        What takes the longer: ``"memory"`` or ``"arithmetic"``.
    share : float
        Of the model's.
    shapes : str
        Of the kernel's arguments.
    """

    kernel: str
    kind: str
    calls: int
    flops: int
    bytes: int
    memory: float
    arithmetic: float
    seconds: float
    bound: str
    share: float
    shapes: str = ""


@dataclasses.dataclass(frozen=True)
class FloorListing(Listing[FloorRow]):
    """All kernels of a model, those with the highest floor first.

    Parameters
    ----------
    peaks : Peaks
        Rates the floors are computed from.
    totals : tuple of FloorRow
        By kind, and of all.
    images : int
        In a call.
    """

    KIND: ClassVar[str] = "floor"
    HEADER: ClassVar[tuple[str, ...]] = (
        "kernel",
        "kind",
        "calls",
        "MB",
        "GFLOP",
        "memory, us",
        "arithmetic, us",
        "bound",
        "share",
        "shapes",
    )

    peaks: Peaks
    totals: tuple[FloorRow, ...]
    images: int

    def cells(self) -> list[tuple[str, ...]]:
        """Return the rows of a table for people, under `HEADER`; the totals last."""
        return [
            (
                row.kernel,
                row.kind,
                f"{row.calls:4d}",
                f"{row.bytes / 1e6:9.2f}",
                f"{row.flops / 1e9:9.3f}",
                f"{1e6 * row.memory:9.2f}",
                f"{1e6 * row.arithmetic:9.2f}",
                row.bound,
                f"{100 * row.share:5.1f}%",
                row.shapes,
            )
            for row in (*self.rows, *self.totals)
        ]

    def summary(self) -> list[str]:
        """Return the floor of the whole model."""
        whole = self.totals[-1]
        return [
            f"the whole model: at least {1e3 * whole.seconds:.4f} ms a call of {self.images} "
            f"images, {self.images / whole.seconds:.0f} images/s"
        ]


def list_floors(
    case: EncoderCase, device: DeviceModel, *, on_step: Callable[[str], None] = lambda _: None
) -> FloorListing:
    """Compile an encoder as far as its kernels, and say what each takes on a GPU at least.

    Parameters
    ----------
    case : EncoderCase
        The encoder.
    device : DeviceModel
        The GPU.
    on_step : callable
        Called with what happens next.
    """
    rows, totals = tabulate(scheduled_kernels(case, device, on_step), device.peaks)
    peaks = device.peaks
    return FloorListing(
        slug=case.slug,
        provenance=Provenance.here(threads=1),
        how="Each kernel reads its inputs and weights once and writes its outputs once, at "
        f"{peaks.bytes / 1e12:.2f} TB/s, or multiplies and adds: products of 16-bit numbers at "
        f"{(peaks.half_flops or peaks.flops) / 1e12:.0f} TFLOP/s, all else at "
        f"{peaks.flops / 1e12:.0f} TFLOP/s. Rates {peaks.how}. Nothing was run.",
        rows=rows,
        peaks=peaks,
        totals=totals,
        images=case.batch,
    )


def scheduled_kernels(
    case: EncoderCase, device: DeviceModel, on_step: Callable[[str], None]
) -> list[Kernel]:
    """Compile an encoder as far as its kernels, without weights.

    Parameters
    ----------
    case, device, on_step
        As for `list_floors`.
    """
    on_step(f"{case.slug}: import")
    imported = frontend.import_model(_blank(case), example=(case.batch, 3, *case.size))
    program, rules = pipeline.run_pipeline(
        imported,
        targets.resolve_target(device.target),
        dtype=case.dtype,
        on_phase=lambda phase: on_step(f"{case.slug}: {phase}"),
    )
    return called_kernels(program.module, rules)


def _blank(case: EncoderCase) -> InternImage:
    """Build the model with matrices of zero, which take memory only where they are written to.

    Vectors are of ones: by the size of scales and biases a type is chosen for what follows.
    """
    model = frontend.create_model(case.variant, features_only=case.features, device="meta")
    blank = {}
    for name, value in model.state_dict().items():
        fill = np.ones if value.ndim == 1 else np.zeros
        blank[name] = torch.from_numpy(fill(tuple(value.shape), np.float32))
    model.load_state_dict(blank, assign=True)
    return model.requires_grad_(False)


def tabulate(
    kernels: Iterable[Kernel], peaks: Peaks
) -> tuple[tuple[FloorRow, ...], tuple[FloorRow, ...]]:
    """Compute floors.

    Parameters
    ----------
    kernels : iterable of Kernel
        Those of a model.
    peaks : Peaks
        Of the GPU.

    Returns
    -------
    rows : tuple of FloorRow
        The highest first.
    totals : tuple of FloorRow
        By kind, in the order of the rows, and of all.
    """
    rows = [_row(kernel, peaks) for kernel in kernels]
    whole = sum(row.seconds for row in rows)
    rows = [dataclasses.replace(row, share=row.seconds / whole) for row in rows]
    rows.sort(key=lambda row: -row.seconds)
    kinds = dict.fromkeys(row.kind for row in rows)
    totals = [_total(kind, [row for row in rows if row.kind == kind]) for kind in kinds]
    return tuple(rows), (*totals, _total("all", rows))


def _row(kernel: Kernel, peaks: Peaks) -> FloorRow:
    work, calls = work_of(kernel), kernel.calls
    floors = Floors.of(work.flops, work.bytes, peaks, work.dtype)
    return FloorRow(
        kernel=kernel.name,
        kind=kernel.kind,
        calls=calls,
        flops=calls * work.flops,
        bytes=calls * work.bytes,
        memory=calls * floors.copy,
        arithmetic=calls * floors.arithmetic,
        seconds=calls * max(floors.copy, floors.arithmetic),
        bound=_bound(floors.copy, floors.arithmetic),
        share=0.0,
        shapes=kernel.shapes,
    )


def _total(kind: str, rows: list[FloorRow]) -> FloorRow:
    def add(field: str) -> float:
        return math.fsum(getattr(row, field) for row in rows)

    return FloorRow(
        kernel="total",
        kind=kind,
        calls=int(add("calls")),
        flops=int(add("flops")),
        bytes=int(add("bytes")),
        memory=add("memory"),
        arithmetic=add("arithmetic"),
        seconds=add("seconds"),
        bound=_bound(add("memory"), add("arithmetic")),
        share=add("share"),
    )


def _bound(memory: float, arithmetic: float) -> str:
    return "memory" if memory >= arithmetic else "arithmetic"
