"""Time or roofline of every kernel of a compiled encoder."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Mapping
from typing import ClassVar, Final

import numpy as np
import tvm

from dcnv3_tvm import frontend, machine, targets
from dcnv3_tvm.bench.cases import EncoderCase
from dcnv3_tvm.bench.cpu_peaks import measure_peaks
from dcnv3_tvm.bench.gpu_models import GpuModel
from dcnv3_tvm.bench.measure import median_of_bursts
from dcnv3_tvm.bench.report import Listing
from dcnv3_tvm.bench.roofline import Peaks, Roofline
from dcnv3_tvm.bench.runners import Array
from dcnv3_tvm.compiler import cpu_pipeline
from dcnv3_tvm.compiler.compile import compile_model
from dcnv3_tvm.compiler.kernel_listing import CalledKernel, KernelArgument, model_kernels
from dcnv3_tvm.compiler.kernel_work import MATMUL_KINDS, flops_per_output
from dcnv3_tvm.dtypes import DTYPE_BYTES
from dcnv3_tvm.provenance import Provenance
from dcnv3_tvm.runtime import library
from dcnv3_tvm.verify.placeholder_weights import placeholder_model
from dcnv3_tvm.verify.random_weights import randomize_

_BURST: Final = 0.01
_MODEL_BURST: Final = 0.2


@dataclasses.dataclass(frozen=True)
class KernelRow:
    """One kernel; all numbers except `calls` and `share` are per call.

    Parameters
    ----------
    kernel, kind : str
        Name and kind.
    calls : int
        Calls per call of the model.
    flops, bytes : int
        Operations, and bytes of inputs, weights and outputs.
    memory, arithmetic : float
        Lower bounds of the time in seconds.
    seconds : float or None
        Measured time.
    share : float
        Fraction of the model's time, or of its roofline if no time was measured.
    shapes : str
        Shapes of the arguments.
    """

    kernel: str
    kind: str
    calls: int
    flops: int
    bytes: int
    memory: float
    arithmetic: float
    seconds: float | None
    share: float
    shapes: str

    @property
    def roofline(self) -> float:
        """Lower bound of the time."""
        return max(self.memory, self.arithmetic)

    @property
    def time(self) -> float:
        """Measured time, or the lower bound if no time was measured."""
        return self.roofline if self.seconds is None else self.seconds


@dataclasses.dataclass(frozen=True)
class KernelTotal:
    """Sums over all calls of some kernels; fields as in `KernelRow`."""

    name: str
    calls: int
    flops: int
    bytes: int
    roofline: float
    seconds: float | None
    share: float

    @classmethod
    def of(cls, name: str, rows: list[KernelRow], *, timed: bool) -> KernelTotal:
        """Add up kernels."""
        return cls(
            name,
            calls=sum(row.calls for row in rows),
            flops=sum(row.calls * row.flops for row in rows),
            bytes=sum(row.calls * row.bytes for row in rows),
            roofline=sum(row.calls * row.roofline for row in rows),
            seconds=sum(row.calls * row.time for row in rows) if timed else None,
            share=sum(row.share for row in rows),
        )

    @property
    def line(self) -> str:
        """The total as text."""
        bound = (
            f"{self.name}: {self.calls} calls, {self.bytes / 1e6:.1f} MB, "
            f"{self.flops / 1e9:.2f} GFLOP, roofline {1e3 * self.roofline:.4f} ms "
        )
        if self.seconds is None:
            return f"{bound}({100 * self.share:.1f}%)"
        rate = f", {self.flops / self.seconds / 1e9:.1f} GFLOP/s" if self.flops else ""
        return (
            f"{bound}= {100 * self.roofline / self.seconds:.0f}% of the measured "
            f"{1e3 * self.seconds:.3f} ms{rate}"
        )


@dataclasses.dataclass(frozen=True)
class KernelListing(Listing[KernelRow]):
    """All kernels of a model, those that take longest first.

    Parameters
    ----------
    peaks : Peaks
        Rates of the roofline.
    totals : tuple of KernelTotal
        Sums by kind, over matmuls and convolutions, and over all kernels.
    model_seconds : float or None
        Measured time of a call of the model.
    """

    KIND: ClassVar[str] = "kernels"
    HEADER: ClassVar[tuple[str, ...]] = (
        "kernel",
        "kind",
        "calls",
        "MB",
        "GFLOP",
        "roofline, ms",
        "bound",
        "ms",
        "time/roofline",
        "share",
        "shapes",
    )

    peaks: Peaks
    totals: tuple[KernelTotal, ...]
    model_seconds: float | None

    def cells(self) -> list[tuple[str, ...]]:
        """Return the text table under `HEADER`."""
        return [
            (
                row.kernel,
                row.kind,
                f"{row.calls:4d}",
                f"{row.bytes / 1e6:8.2f}",
                f"{row.flops / 1e9:8.3f}",
                f"{1e3 * row.roofline:9.4f}",
                "memory" if row.memory >= row.arithmetic else "arithmetic",
                "" if row.seconds is None else f"{1e3 * row.seconds:9.4f}",
                "" if row.seconds is None else f"{row.seconds / row.roofline:6.2f}x",
                f"{100 * row.share:4.1f}%",
                row.shapes,
            )
            for row in self.rows
        ]

    def summary(self) -> list[str]:
        """Return the totals and the time of the model."""
        lines = [total.line for total in self.totals]
        if self.model_seconds is not None:
            lines.append(f"the whole model: {1e3 * self.model_seconds:.3f} ms")
        return lines


def time_kernels(
    case: EncoderCase, *, threads: int, on_step: Callable[[str], None] = lambda _: None
) -> KernelListing:
    """Compile an encoder for this CPU and time each of its kernels alone, on random inputs.

    A kernel called repeatedly reads inputs that fit from the cache, so it may be faster than in the
    model and faster than its roofline. The time of the whole model is measured for comparison.

    Parameters
    ----------
    case : EncoderCase
        The encoder.
    threads : int
        Threads that compute.
    on_step : callable
        Called with a description of each step before it runs.
    """
    provenance = Provenance.here(threads)
    on_step("measure the peak rates of the machine")
    peaks = measure_peaks(threads)
    on_step(f"{case.slug}: import")
    model = frontend.create_model(case.variant, features_only=case.features)
    imported = frontend.import_model(randomize_(model, seed=0), example=(case.batch, 3, *case.size))
    on_step(f"{case.slug}: compile")
    compiled = compile_model(imported, dtype=case.dtype)
    target = targets.resolve_target("auto")
    kernels = model_kernels(imported, target, dtype=case.dtype)
    on_step(f"{case.slug}: time {len(kernels)} kernels")
    library.use_threads(threads)
    seconds = dict(_time_each(kernels, target))
    on_step(f"{case.slug}: time the model")
    image = np.random.default_rng(0).standard_normal((case.batch, 3, *case.size), np.float32)
    compiled.threads = threads
    model_seconds = median_of_bursts(lambda: compiled(image), seconds=_MODEL_BURST)
    rows, totals = tabulate(kernels, peaks, seconds)
    return KernelListing(
        slug=case.slug,
        provenance=provenance,
        how="Each kernel alone, called repeatedly with warm caches. Roofline of "
        f"{peaks.flops / 1e9:.0f} GFLOP/s in float32, "
        f"{peaks.flops_in('bfloat16') / 1e9:.0f} for bfloat16 matmuls, and "
        f"{peaks.bytes / 1e9:.1f} GB/s, {peaks.how}.",
        rows=rows,
        peaks=peaks,
        totals=totals,
        model_seconds=model_seconds,
    )


def list_rooflines(
    case: EncoderCase, gpu: GpuModel, *, on_step: Callable[[str], None] = lambda _: None
) -> KernelListing:
    """Lower an encoder for a GPU and list the roofline of each kernel; runs nothing.

    Parameters
    ----------
    case : EncoderCase
        The encoder.
    gpu : GpuModel
        Target and peak rates.
    on_step : callable
        Called with a description of each step before it runs.
    """
    on_step(f"{case.slug}: import")
    model = placeholder_model(case.variant, features_only=case.features)
    imported = frontend.import_model(model, example=(case.batch, 3, *case.size), features="never")
    kernels = model_kernels(
        imported,
        targets.resolve_target(gpu.target),
        dtype=case.dtype,
        on_phase=lambda phase: on_step(f"{case.slug}: {phase}"),
    )
    peaks = gpu.peaks
    rows, totals = tabulate(kernels, peaks)
    return KernelListing(
        slug=case.slug,
        provenance=Provenance.here(threads=1),
        how=f"Roofline of {peaks.bytes / 1e12:.2f} TB/s, "
        f"{(peaks.half_flops or peaks.flops) / 1e12:.0f} TFLOP/s for 16-bit matmuls and "
        f"{peaks.flops / 1e12:.0f} TFLOP/s for everything else, {peaks.how}. Nothing was run.",
        rows=rows,
        peaks=peaks,
        totals=totals,
        model_seconds=None,
    )


def _time_each(
    kernels: list[CalledKernel], target: tvm.target.Target
) -> Iterable[tuple[str, float]]:
    module = {
        kernel.name: kernel.function.with_attr("global_symbol", kernel.name) for kernel in kernels
    }
    executable = tvm.compile(
        tvm.IRModule(module), target=target, tir_pipeline=cpu_pipeline.PIPELINE
    )
    machine.enable_amx()
    rng = np.random.default_rng(0)
    for kernel in kernels:
        arrays = [_random(rng, argument) for argument in (*kernel.inputs, *kernel.outputs)]
        call = functools.partial(executable[kernel.name], *map(tvm.runtime.tensor, arrays))
        yield kernel.name, median_of_bursts(call, seconds=_BURST)


def _random(rng: np.random.Generator, argument: KernelArgument) -> Array:
    return rng.standard_normal(argument.shape, np.float32).astype(argument.dtype)


def tabulate(
    kernels: Iterable[CalledKernel], peaks: Peaks, seconds: Mapping[str, float] | None = None
) -> tuple[tuple[KernelRow, ...], tuple[KernelTotal, ...]]:
    """Compute rooflines, shares and totals.

    Parameters
    ----------
    kernels : iterable of CalledKernel
        Kernels of a model.
    peaks : Peaks
        Rates of the roofline.
    seconds : dict of str to float, optional
        Measured time of one call by name.

    Returns
    -------
    rows : tuple of KernelRow
        Those that take longest first.
    totals : tuple of KernelTotal
        Sums by kind, over matmuls and convolutions, and over all kernels.
    """
    rows = [
        _row(kernel, peaks, None if seconds is None else seconds[kernel.name]) for kernel in kernels
    ]
    whole = sum(row.calls * row.time for row in rows)
    rows = [dataclasses.replace(row, share=row.calls * row.time / whole) for row in rows]
    rows.sort(key=lambda row: -row.share)
    groups = {kind: [row for row in rows if row.kind == kind] for kind in {r.kind: 0 for r in rows}}
    groups["matmuls"] = [row for row in rows if row.kind in MATMUL_KINDS]
    groups["all"] = rows
    totals = [
        KernelTotal.of(name, group, timed=seconds is not None)
        for name, group in groups.items()
        if group
    ]
    return tuple(rows), tuple(totals)


def _row(kernel: CalledKernel, peaks: Peaks, seconds: float | None) -> KernelRow:
    roofline = kernel_roofline(kernel, peaks)
    return KernelRow(
        kernel=kernel.name,
        kind=kernel.kind,
        calls=kernel.calls,
        flops=kernel_flops(kernel),
        bytes=kernel_bytes(kernel),
        memory=roofline.memory,
        arithmetic=roofline.arithmetic,
        seconds=seconds,
        share=0.0,
        shapes=kernel.shapes,
    )


def kernel_roofline(kernel: CalledKernel, peaks: Peaks) -> Roofline:
    """Return the roofline of one call of a kernel."""
    # Everything but matmuls computes in float32, whatever the dtype of its arguments.
    dtype = kernel.inputs[1].dtype if kernel.kind in MATMUL_KINDS else "float32"
    return Roofline.of(kernel_flops(kernel), kernel_bytes(kernel), peaks, dtype)


def kernel_bytes(kernel: CalledKernel) -> int:
    """Return the bytes of a kernel's inputs, weights and outputs."""
    arguments = (*kernel.inputs, *kernel.outputs)
    return sum(math.prod(shape) * DTYPE_BYTES[dtype] for shape, dtype in arguments)


def kernel_flops(kernel: CalledKernel) -> int:
    """Count the multiplications and additions of one call of a kernel, without padding."""
    return round(math.prod(kernel.outputs[0].shape) * flops_per_output(kernel))
