"""What every kernel of an encoder moves through a GPU's memory, counted with no GPU at hand."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, ClassVar, Final

import numpy as np

from dcnv3_tvm import targets
from dcnv3_tvm.bench.cases import EncoderCase
from dcnv3_tvm.bench.cost import scheduled_kernels
from dcnv3_tvm.bench.device_models import DeviceModel
from dcnv3_tvm.bench.floors import Floors
from dcnv3_tvm.bench.kernels import work_of
from dcnv3_tvm.bench.listing import Listing
from dcnv3_tvm.bench.problems import Array
from dcnv3_tvm.bench.provenance import Provenance
from dcnv3_tvm.compiler.kernel_listing import Kernel, Tensor
from dcnv3_tvm.dtypes import numpy_dtype
from emulated_gpu import EmulatedGpu
from emulated_gpu.traffic import PRODUCT_FLOPS, SECTOR, Traffic

_WAVEFRONT: Final = 128
"""Bytes that a multiprocessor's L1 cache and shared memory deliver in a clock, together."""

_RANGE: Final = 2.0
"""Inputs are between this and its negative: offsets are, in pixels, and nothing else matters."""


@dataclasses.dataclass(frozen=True)
class TrafficRow:
    """A kernel, or several together; numbers are of all calls.

    Parameters
    ----------
    kernel : str
        Its name; of several, what they have in common.
    kind : str
        What it computes.
    calls : int
        In a call of the model.
    bytes : int
        Of inputs and weights, read once, and of outputs, written once.
    level_two_bytes : int
        Between L2 and the multiprocessors, if the L1 cache keeps all that a block needs again.
    load_sectors, least_load_sectors, store_sectors, least_store_sectors : int
        Of global memory: touched by requests of warps, and filled by what they need.
    wavefronts, least_wavefronts : int
        Of shared memory: with conflicts of banks, and without.
    memory, level_two, data_path, arithmetic : float
        Least seconds: by `bytes`; by `level_two_bytes`; by what L1 and shared memory deliver; by
        the floor's operations, or those of the tensor cores with what fills up their tiles.
    seconds : float
        The largest of the four for each kernel.
    bound : str
        Which that is.
    shapes : str
        Of the kernel's arguments.
    """

    kernel: str
    kind: str
    calls: int
    bytes: int
    level_two_bytes: int
    load_sectors: int
    least_load_sectors: int
    store_sectors: int
    least_store_sectors: int
    wavefronts: int
    least_wavefronts: int
    memory: float
    level_two: float
    data_path: float
    arithmetic: float
    seconds: float
    bound: str
    shapes: str = ""


_TEXTS: Final = {"kernel", "kind", "bound", "shapes"}

BOUNDS: Final = ("memory", "level_two", "data_path", "arithmetic")
"""Fields of `TrafficRow`: what may take a kernel the longest."""


@dataclasses.dataclass(frozen=True)
class TrafficListing(Listing[TrafficRow]):
    """All kernels of a model, those that take longest at least first.

    Parameters
    ----------
    totals : tuple of TrafficRow
        By kind, and of all.
    images : int
        In a call.
    """

    KIND: ClassVar[str] = "gpu-traffic"
    HEADER: ClassVar[tuple[str, ...]] = (
        "kernel",
        "kind",
        "calls",
        "MB",
        "L2, MB",
        "L2/MB",
        "loads",
        "stores",
        "shared",
        "conflicts",
        "memory, us",
        "L2, us",
        "L1, us",
        "arithmetic, us",
        "bound",
        "shapes",
    )

    totals: tuple[TrafficRow, ...]
    images: int

    def cells(self) -> list[tuple[str, ...]]:
        """Return the rows of a table for people, under `HEADER`; the totals last."""
        return [
            (
                row.kernel,
                row.kind,
                f"{row.calls:4d}",
                f"{row.bytes / 1e6:8.2f}",
                f"{row.level_two_bytes / 1e6:8.2f}",
                f"{row.level_two_bytes / row.bytes:5.2f}",
                _percent(row.least_load_sectors, row.load_sectors),
                _percent(row.least_store_sectors, row.store_sectors),
                f"{row.wavefronts:10d}",
                f"{row.wavefronts / row.least_wavefronts:5.2f}" if row.least_wavefronts else "",
                *(f"{1e6 * getattr(row, bound):8.2f}" for bound in BOUNDS),
                _NAMES[row.bound],
                row.shapes,
            )
            for row in (*self.rows, *self.totals)
        ]

    def summary(self) -> list[str]:
        """Return the floor of the whole model, and how much of it traffic adds."""
        whole = self.totals[-1]
        floor = math.fsum(max(row.memory, row.arithmetic) for row in self.rows)
        by_one = ", ".join(
            f"{_NAMES[bound]} {1e3 * getattr(whole, bound):.4f} ms" for bound in BOUNDS
        )
        return [
            f"by one alone: {by_one}",
            f"the whole model: at least {1e3 * whole.seconds:.4f} ms a call of {self.images} "
            f"images by all of these, {1e3 * floor:.4f} ms of it by memory and arithmetic",
        ]


_NAMES: Final = dict(zip(BOUNDS, ("memory", "L2", "L1", "arithmetic"), strict=True))


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:5.1f}%" if whole else ""


def list_traffic(
    case: EncoderCase,
    device: DeviceModel,
    *,
    most_blocks: int,
    on_step: Callable[[str], None] = lambda _: None,
) -> TrafficListing:
    """Run blocks of every kernel of an encoder on an emulated GPU, and count what they move.

    Parameters
    ----------
    case : EncoderCase
        The encoder.
    device : DeviceModel
        The GPU.
    most_blocks : int
        Of a launch, that are run and stand for all.
    on_step : callable
        Called with what happens next.
    """
    kernels = scheduled_kernels(case, device, on_step)
    target = targets.resolve_target(device.target)
    inputs = _random_inputs(kernels)
    on_step(f"{case.slug}: compile and run blocks of {len(kernels)} kernels")
    with EmulatedGpu(str(target.attrs["arch"])) as gpu:
        traffic = gpu.traffic(
            {kernel.name: kernel.function for kernel in kernels},
            target,
            {kernel.name: (inputs(kernel.inputs), kernel.outputs) for kernel in kernels},
            most_blocks=most_blocks,
        )
    rows = sorted(
        (tabulate(kernel, traffic[kernel.name], device) for kernel in kernels),
        key=lambda row: -row.seconds,
    )
    kinds = dict.fromkeys(row.kind for row in rows)
    totals = [_total(kind, [row for row in rows if row.kind == kind]) for kind in kinds]
    return TrafficListing(
        slug=case.slug,
        provenance=Provenance.here(threads=1),
        how=_how(device, most_blocks),
        rows=tuple(rows),
        totals=(*totals, _total("all", rows)),
        images=case.batch,
    )


def _how(device: DeviceModel, most_blocks: int) -> str:
    chip = device.on_chip
    return (
        f"At most {most_blocks} blocks of each kernel were run, on a GPU that is emulated by the "
        "processor, and stand for all. Loads and stores: of what requests of warps touch in global "
        "memory, how much they need. Shared: wavefronts, and how many times those that would do "
        "without conflicts. Least times: by memory and by arithmetic as of `bench floor`, at rates "
        f"{device.peaks.how}, but products with what fills up the tiles of tensor cores; by L2, "
        f"what is distinct in each block, at {chip.bytes / 1e12:.1f} TB/s; by L1 and shared "
        f"memory, at {_WAVEFRONT} bytes a clock in each of {chip.multiprocessors} multiprocessors "
        f"at {chip.clock / 1e9:.2f} GHz, {chip.how}."
    )


def _random_inputs(kernels: list[Kernel]) -> Callable[[tuple[Tensor, ...]], list[Array]]:
    """Draw one array of each type, of which all inputs are parts: a model's take much memory."""
    sizes: dict[str, int] = {}
    for kernel in kernels:
        for shape, dtype in kernel.inputs:
            sizes[dtype] = max(sizes.get(dtype, 0), math.prod(shape))
    rng = np.random.default_rng(0)
    drawn = {
        dtype: rng.uniform(-_RANGE, _RANGE, size).astype(np.float32).astype(numpy_dtype(dtype))
        for dtype, size in sizes.items()
    }
    return lambda tensors: [
        drawn[dtype][: math.prod(shape)].reshape(shape) for shape, dtype in tensors
    ]


def tabulate(kernel: Kernel, traffic: Traffic, device: DeviceModel) -> TrafficRow:
    """Compute the least times of a kernel.

    Parameters
    ----------
    kernel : Kernel
        What was counted.
    traffic : Traffic
        Of a call.
    device : DeviceModel
        The GPU.
    """
    work, calls, chip = work_of(kernel), kernel.calls, device.on_chip
    floors = Floors.of(work.flops, work.bytes, device.peaks, work.dtype)
    products = traffic.products * PRODUCT_FLOPS / device.peaks.flops_in("float16")
    # What is copied into shared memory counts there.
    sectors = traffic.loads.sectors - traffic.copied_sectors + traffic.stores.sectors
    wavefronts = traffic.wavefronts + sectors * SECTOR / _WAVEFRONT
    busy = min(traffic.blocks, chip.multiprocessors)
    times = {
        "memory": calls * floors.copy,
        "level_two": calls * traffic.level_two_bytes / chip.bytes,
        "data_path": calls * wavefronts / (busy * chip.clock),
        "arithmetic": calls * max(floors.arithmetic, products),
    }
    bound = max(times, key=times.__getitem__)
    return TrafficRow(
        kernel=kernel.name,
        kind=kernel.kind,
        calls=calls,
        bytes=calls * work.bytes,
        level_two_bytes=calls * traffic.level_two_bytes,
        load_sectors=calls * traffic.loads.sectors,
        least_load_sectors=calls * traffic.loads.least_sectors,
        store_sectors=calls * traffic.stores.sectors,
        least_store_sectors=calls * traffic.stores.least_sectors,
        wavefronts=calls * traffic.wavefronts,
        least_wavefronts=calls * traffic.least_wavefronts,
        **times,
        seconds=times[bound],
        bound=bound,
        shapes=kernel.shapes,
    )


def _total(kind: str, rows: list[TrafficRow]) -> TrafficRow:
    numbers = {field.name for field in dataclasses.fields(TrafficRow)} - _TEXTS
    sums: dict[str, Any] = {name: sum(getattr(row, name) for row in rows) for name in numbers}
    bound = max(BOUNDS, key=sums.__getitem__)
    return TrafficRow(kernel="total", kind=kind, bound=bound, **sums)
