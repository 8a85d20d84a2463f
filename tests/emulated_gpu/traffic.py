"""What a kernel moves through the memory of a GPU, as the emulated one counts it.

The rules are those of `traffic.cpp`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Final

SECTOR: Final = 32
"""Bytes of a sector, in which global memory moves."""

PRODUCT_FLOPS: Final = 2 * 16 * 8 * 16
"""Multiplications and additions of one instruction of tensor cores, ``mma.m16n8k16``."""


@dataclasses.dataclass(frozen=True)
class GlobalTraffic:
    """Loads from global memory, or stores.

    Parameters
    ----------
    requests : int
        Instructions of warps.
    sectors : int
        Touched by each request, summed.
    least_sectors : int
        Filled by the distinct bytes of each request, summed.
    block_sectors : int
        Touched by each block, summed: what comes from L2, or goes there, if a block's L1 keeps all.
    """

    requests: int
    sectors: int
    least_sectors: int
    block_sectors: int

    @property
    def efficiency(self) -> float:
        """The part of what is touched that is needed; 1 if nothing is."""
        return self.least_sectors / self.sectors if self.sectors else 1.0


@dataclasses.dataclass(frozen=True)
class SharedTraffic:
    """Loads from shared memory, or stores.

    Parameters
    ----------
    requests : int
        Instructions of warps.
    wavefronts : int
        In which the banks serve them.
    least_wavefronts : int
        That would do without conflicts.
    """

    requests: int
    wavefronts: int
    least_wavefronts: int


@dataclasses.dataclass(frozen=True)
class Traffic:
    """All that a kernel moves in a call.

    Parameters
    ----------
    blocks, counted_blocks : int
        Of its launches, and those of them that were run; what they move stands for all.
    loads, stores : GlobalTraffic
        Of global memory; copies into shared memory (``cp.async``) are loads.
    copied_sectors : int
        The loads' sectors of such copies.
    shared_loads, shared_stores : SharedTraffic
        Of shared memory; such copies are stores, and ``ldmatrix`` is a load.
    products : int
        Instructions of tensor cores.
    """

    blocks: int
    counted_blocks: int
    loads: GlobalTraffic
    stores: GlobalTraffic
    copied_sectors: int
    shared_loads: SharedTraffic
    shared_stores: SharedTraffic
    products: int

    @property
    def level_two_bytes(self) -> int:
        """Between L2 and the multiprocessors at least: what is distinct in each block."""
        return SECTOR * (self.loads.block_sectors + self.stores.block_sectors)

    @property
    def wavefronts(self) -> int:
        """Of shared memory, loads and stores."""
        return self.shared_loads.wavefronts + self.shared_stores.wavefronts

    @property
    def least_wavefronts(self) -> int:
        """Of shared memory, if there were no conflicts."""
        return self.shared_loads.least_wavefronts + self.shared_stores.least_wavefronts


def traffic_of(log: str) -> Traffic:
    """Add up the launches in a log of the driver.

    Raises
    ------
    ValueError
        If nothing was counted.
    """
    launches = [
        [int(number) for number in line.split()[1:]]
        for line in log.splitlines()
        if line.startswith("traffic ")
    ]
    if not launches:
        raise ValueError("no launch was counted: were the kernels compiled to be?")
    sums = [0] * len(launches[0])
    for blocks, counted, *moved in launches:
        scaled = (round(number * blocks / counted) for number in moved)
        sums = [total + new for total, new in zip(sums, (blocks, counted, *scaled), strict=True)]
    numbers = iter(sums)
    return Traffic(
        blocks=next(numbers),
        counted_blocks=next(numbers),
        loads=_global(numbers),
        stores=_global(numbers),
        copied_sectors=next(numbers),
        shared_loads=_shared(numbers),
        shared_stores=_shared(numbers),
        products=next(numbers),
    )


def _global(numbers: Iterator[int]) -> GlobalTraffic:
    return GlobalTraffic(*(next(numbers) for _ in dataclasses.fields(GlobalTraffic)))


def _shared(numbers: Iterator[int]) -> SharedTraffic:
    return SharedTraffic(*(next(numbers) for _ in dataclasses.fields(SharedTraffic)))
