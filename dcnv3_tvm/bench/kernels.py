"""Where the time of an encoder goes: every kernel of the compiled model, timed alone."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Mapping
from typing import ClassVar, Final, NamedTuple

import numpy as np
import tvm

from dcnv3_tvm import frontend, targets
from dcnv3_tvm.bench.cases import EncoderCase
from dcnv3_tvm.bench.floors import Floors, Peaks, measure_peaks
from dcnv3_tvm.bench.listing import Listing
from dcnv3_tvm.bench.measure import median_of_bursts
from dcnv3_tvm.bench.problems import Array
from dcnv3_tvm.compiler import pipeline
from dcnv3_tvm.compiler.compile import compile_model
from dcnv3_tvm.compiler.kernel_listing import Kernel, KernelArgument, called_kernels
from dcnv3_tvm.dtypes import DTYPE_BYTES
from dcnv3_tvm.kernels import gemm, mlp
from dcnv3_tvm.kernels.gemm import ACCUMULATOR, round_up
from dcnv3_tvm.op.tensorir import spec_of
from dcnv3_tvm.provenance import Provenance
from dcnv3_tvm.runtime import library
from dcnv3_tvm.transform.gpu_padding import depth_multiple
from dcnv3_tvm.verify.random_weights import randomize_

PRODUCTS: Final = ("matmul", "convolution", gemm.KERNEL, mlp.KERNEL)
"""Kinds of kernels that are bound by arithmetic."""

_BURST: Final = 0.01
_MODEL_BURST: Final = 0.2


class Work(NamedTuple):
    """What a call of a kernel cannot do without.

    Parameters
    ----------
    flops : int
        Multiplications and additions; 0 where they are not what it takes time for.
    bytes : int
        Of inputs and weights, read once, and of outputs, written once.
    dtype : str
        Element type of what is multiplied.
    """

    flops: int
    bytes: int
    dtype: str


@dataclasses.dataclass(frozen=True)
class KernelRow:
    """A kernel's work and time.

    Parameters
    ----------
    kernel, rule : str
        Its name, and the schedule rule that took it.
    calls : int
        In a call of the model.
    seconds : float
        Of one call.
    share : float
        Of all calls in the sum over all kernels.
    flops : int
        Multiplications and additions of one call; 0 where they are not what it takes time for.
    bytes : int
        Of inputs, weights and outputs of one call.
    copy_floor, arithmetic_floor : float
        Least seconds of one call.
    shapes : str
        Of its arguments, the outputs behind an arrow.
    """

    kernel: str
    rule: str
    calls: int
    seconds: float
    share: float
    flops: int
    bytes: int
    copy_floor: float
    arithmetic_floor: float
    shapes: str

    @property
    def floor(self) -> float:
        """The larger of the two: copies and arithmetic can be done at once."""
        return max(self.copy_floor, self.arithmetic_floor)


@dataclasses.dataclass(frozen=True)
class Total:
    """The kernels of some rules together.

    Parameters
    ----------
    name : str
        Of the rule, or ``"products"`` or ``"all"``.
    calls : int
        In a call of the model.
    seconds, floor : float
        Of all of them, measured and least.
    flops : int
        Of all of them.
    of_peak : float or None
        Their rate as a fraction of the machine's; None where it says nothing.
    """

    name: str
    calls: int
    seconds: float
    floor: float
    flops: int
    of_peak: float | None


@dataclasses.dataclass(frozen=True)
class KernelListing(Listing[KernelRow]):
    """All kernels of a model, those that take longest first.

    Parameters
    ----------
    peaks : Peaks
        Rates the floors are computed from.
    totals : tuple of Total
        By rule, of the products, and of all.
    model_seconds : float
        Of a call of the whole model.
    """

    KIND: ClassVar[str] = "kernels"
    HEADER: ClassVar[tuple[str, ...]] = (
        "kernel",
        "rule",
        "calls",
        "ms a call",
        "share",
        "GFLOP/s",
        "floor, ms",
        "time/floor",
        "shapes",
    )

    peaks: Peaks
    totals: tuple[Total, ...]
    model_seconds: float

    def cells(self) -> list[tuple[str, ...]]:
        """Return the rows of a table for people, under `HEADER`."""
        return [
            (
                row.kernel,
                row.rule,
                f"{row.calls:4d}",
                f"{1e3 * row.seconds:9.4f}",
                f"{100 * row.share:4.1f}%",
                f"{row.flops / row.seconds / 1e9:7.1f}" if row.flops else "",
                f"{1e3 * row.floor:9.4f}",
                f"{row.seconds / row.floor:7.2f}",
                row.shapes,
            )
            for row in self.rows
        ]

    def summary(self) -> list[str]:
        """Return a line for each total, and the time of the whole model."""
        lines = []
        for total in self.totals:
            rate = f", {total.flops / total.seconds / 1e9:.1f} GFLOP/s" if total.flops else ""
            peak = f", {100 * total.of_peak:.0f}% of the peak" if total.of_peak is not None else ""
            lines.append(
                f"{total.name}: {1e3 * total.seconds:.3f} ms in {total.calls} calls, "
                f"{total.seconds / total.floor:.2f} times the floor{rate}{peak}"
            )
        return [*lines, f"the whole model: {1e3 * self.model_seconds:.3f} ms"]


def list_kernels(
    case: EncoderCase, *, threads: int, on_step: Callable[[str], None] = lambda _: None
) -> KernelListing:
    """Compile an encoder, and time each of its kernels alone.

    A kernel that is called again and again finds its inputs in the cache, where they fit, and so
    is faster than in the model, and may be faster than its floor; the time of the whole model
    stands beside the sum for that. Inputs are random.

    Parameters
    ----------
    case : EncoderCase
        The encoder, with its head.
    threads : int
        To compute with.
    on_step : callable
        Called with what happens next.
    """
    provenance = Provenance.here(threads)
    on_step("measure the machine")
    peaks = measure_peaks(threads)
    on_step(f"{case.slug}: import")
    model = frontend.create_model(case.variant, features_only=case.features)
    imported = frontend.import_model(randomize_(model, seed=0), example=(case.batch, 3, *case.size))
    on_step(f"{case.slug}: compile")
    compiled = compile_model(imported, dtype=case.dtype)
    target = targets.resolve_target("auto")
    program, rules = pipeline.run_pipeline(imported, target, dtype=case.dtype)
    kernels = called_kernels(program.module, rules)
    on_step(f"{case.slug}: time {len(kernels)} kernels")
    library.use_threads(threads)
    seconds = {kernel.name: time for kernel, time in _timed(kernels, target)}
    on_step(f"{case.slug}: time the model")
    image = np.random.default_rng(0).standard_normal((case.batch, 3, *case.size), np.float32)
    compiled.threads = threads
    model_seconds = median_of_bursts(lambda: compiled(image), seconds=_MODEL_BURST)
    rows, totals = tabulate(kernels, seconds, peaks)
    return KernelListing(
        slug=case.slug,
        provenance=provenance,
        how=f"Each kernel alone, called again and again: what fits the caches is read from there. "
        f"Floors from {peaks.flops / 1e9:.0f} GFLOP/s in float32, twice that for products of "
        f"bfloat16 (two multiply-adds a lane), and {peaks.bytes / 1e9:.1f} GB/s, {peaks.how}.",
        rows=rows,
        peaks=peaks,
        totals=totals,
        model_seconds=model_seconds,
    )


def _timed(kernels: list[Kernel], target: tvm.target.Target) -> Iterable[tuple[Kernel, float]]:
    module = {
        kernel.name: kernel.function.with_attr("global_symbol", kernel.name) for kernel in kernels
    }
    executable = tvm.compile(tvm.IRModule(module), target=target)
    rng = np.random.default_rng(0)
    for kernel in kernels:
        arrays = [_random(rng, tensor) for tensor in (*kernel.inputs, *kernel.outputs)]
        call = functools.partial(executable[kernel.name], *map(tvm.runtime.tensor, arrays))
        yield kernel, median_of_bursts(call, seconds=_BURST)


def _random(rng: np.random.Generator, tensor: KernelArgument) -> Array:
    return rng.standard_normal(tensor.shape, np.float32).astype(tensor.dtype)


def work_of(kernel: Kernel) -> Work:
    """Count the operations and the bytes of a call."""
    tensors = (*kernel.inputs, *kernel.outputs)
    return Work(
        operations(kernel),
        sum(math.prod(shape) * DTYPE_BYTES[dtype] for shape, dtype in tensors),
        # What is no product computes in float32, whatever it reads and writes.
        kernel.inputs[1].dtype if kernel.kind in PRODUCTS else "float32",
    )


def operations(kernel: Kernel) -> int:
    """Count the multiplications and additions of a call; 0 where others are what takes the time.

    Products and convolutions by their extents, without what fills them up; the sampling as
    `DCNv3Spec.flops` counts it.
    """
    elements = math.prod(kernel.outputs[0].shape)
    if kernel.kind == "matmul":
        return 2 * elements * kernel.inputs[0].shape[-1]
    if kernel.kind == "convolution":
        # The weight is (tiles, kh, kw, ...).
        return 2 * elements * math.prod(kernel.inputs[1].shape[1:3]) * kernel.inputs[0].shape[-1]
    if kernel.kind == gemm.KERNEL:
        return 2 * elements * _depth(kernel)
    if kernel.kind == mlp.KERNEL:
        # Its weights have a row for each hidden and for each output column.
        rows, hidden = elements // kernel.outputs[0].shape[-1], kernel.inputs[1].shape[0]
        return 2 * rows * hidden * (kernel.inputs[0].shape[-1] + kernel.outputs[0].shape[-1])
    if kernel.kind == "depthwise":
        return 2 * elements * math.prod(kernel.inputs[1].shape[:2])
    if kernel.kind.startswith("dcnv3"):
        return spec_of(kernel.function).flops
    return 0


def _depth(kernel: Kernel) -> int:
    """Count the products in a sum of a kernel of `dcnv3_tvm.kernels.gemm`, whose weight is padded.

    Its convolutions have square windows.
    """
    x, weight = kernel.inputs[:2]
    # `pack_gemm_weight` turns weights of float32 round.
    channels, filled = x.shape[-1], weight.shape[0 if weight.dtype == ACCUMULATOR else -1]
    if round_up(channels, depth_multiple(channels)) == filled:
        return channels
    return channels * math.isqrt(filled // channels) ** 2


def tabulate(
    kernels: Iterable[Kernel], seconds: Mapping[str, float], peaks: Peaks
) -> tuple[tuple[KernelRow, ...], tuple[Total, ...]]:
    """Put times beside work and floors.

    Parameters
    ----------
    kernels : iterable of Kernel
        What was timed.
    seconds : dict of str to float
        Of one call, by name.
    peaks : Peaks
        Of the machine.

    Returns
    -------
    rows : tuple of KernelRow
        Those that take longest first.
    totals : tuple of Total
        By rule, of the products, and of all.
    """
    kernels = sorted(kernels, key=lambda kernel: -kernel.calls * seconds[kernel.name])
    whole = sum(kernel.calls * seconds[kernel.name] for kernel in kernels)
    rows = tuple(_row(kernel, seconds[kernel.name], whole, peaks) for kernel in kernels)
    by_rule = {rule: [row for row in rows if row.rule == rule] for rule in _rules(rows)}
    products = [row for row in rows if row.rule in PRODUCTS]
    groups = by_rule | {"products": products, "all": list(rows)}
    return rows, tuple(_total(name, group) for name, group in groups.items() if group)


def _rules(rows: Iterable[KernelRow]) -> Iterable[str]:
    return dict.fromkeys(row.rule for row in rows)


def _total(name: str, rows: Iterable[KernelRow]) -> Total:
    def add(value: Callable[[KernelRow], float]) -> float:
        return sum(row.calls * value(row) for row in rows)

    seconds = add(lambda row: row.seconds)
    return Total(
        name,
        calls=sum(row.calls for row in rows),
        seconds=seconds,
        floor=add(lambda row: row.floor),
        flops=sum(row.calls * row.flops for row in rows),
        of_peak=add(lambda row: row.arithmetic_floor) / seconds if name == "products" else None,
    )


def _row(kernel: Kernel, seconds: float, whole: float, peaks: Peaks) -> KernelRow:
    work = work_of(kernel)
    floors = Floors.of(work.flops, work.bytes, peaks, work.dtype)
    return KernelRow(
        kernel=kernel.name,
        rule=kernel.rule,
        calls=kernel.calls,
        seconds=seconds,
        share=kernel.calls * seconds / whole,
        flops=work.flops,
        bytes=work.bytes,
        copy_floor=floors.copy,
        arithmetic_floor=floors.arithmetic,
        shapes=kernel.shapes,
    )
