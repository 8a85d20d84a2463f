"""Choose the work of a thread and the tile of a thread block for DCNv3 on GPUs."""

from __future__ import annotations

import dataclasses
from typing import Final

from dcnv3_tvm import gpu
from dcnv3_tvm.schedules.gpu.loops import divisors
from dcnv3_tvm.schedules.space import DecisionError, SearchSpace
from dcnv3_tvm.spec import DCNv3Spec

_THREADS: Final = 128
"""Default number of threads of a block."""

_MIN_PIXELS: Final = 2
"""Least pixels of a block by default: with one, ptxas was seen to use more registers."""

_PIXELS: Final = (1, 2, 4, 8, 16, 32, 64, 128)
"""Candidates for the pixels of a block, besides the divisors of the image."""

_DYNAMIC_SIDE: Final = 64
"""Assumed rows or columns of an output of dynamic size."""

SHUFFLE_WIDTHS: Final = (2, 4, 8)
"""Numbers of threads that may exchange values by warp shuffles."""

_MAX_SUMS: Final = 32
"""Most channels that one thread accumulates, over all its outputs."""


@dataclasses.dataclass(frozen=True)
class ThreadWork:
    """Outputs that one thread accumulates.

    Parameters
    ----------
    vectors : int
        Vectors of the channels of a group.
    columns, groups : int
        Adjacent outputs along these axes. As many threads, one for each vector of the channels of
        a group, share these outputs: each computes the sampling points of one of them, and sends
        them to the others by warp shuffles.
    """

    vectors: int = 1
    columns: int = 1
    groups: int = 1

    @property
    def sharing_threads(self) -> int:
        """Threads that share the sampling points of their outputs."""
        return self.columns * self.groups


@dataclasses.dataclass(frozen=True)
class BlockTile:
    """Outputs of one thread block.

    Parameters
    ----------
    work : ThreadWork
        Outputs of each thread.
    groups, pixels : int
        Groups and output pixels of the block.
    """

    work: ThreadWork
    groups: int
    pixels: int


@dataclasses.dataclass(frozen=True)
class OutputSize:
    """Extents of the output; None where dynamic."""

    images: int | None
    rows: int | None
    columns: int | None

    @property
    def image_is_static(self) -> bool:
        """Whether rows and columns are static."""
        return self.rows is not None and self.columns is not None

    @property
    def max_block_pixels(self) -> int:
        """Most pixels of a block: those of an image, or the most along a dynamic axis.

        A block must not have more pixels than an image. See tvm_workarounds: unit-extent-guard.
        """
        return (self.rows or _PIXELS[-1]) * (self.columns or _PIXELS[-1])

    @property
    def pixels(self) -> int:
        """Output pixels, estimated where the size is dynamic."""
        return (self.images or 1) * (self.rows or _DYNAMIC_SIDE) * (self.columns or _DYNAMIC_SIDE)

    def divides_into(self, pixels: int) -> bool:
        """Return whether blocks of so many pixels cover an image without absent pixels."""
        return self.image_is_static and self.max_block_pixels % pixels == 0


def choose_tile(spec: DCNv3Spec, size: OutputSize, space: SearchSpace) -> BlockTile:
    """Choose the tile of a thread block.

    Raises
    ------
    DecisionError
        If threads were to share points in a block with absent pixels: shuffles need all threads.
    """
    works = _thread_works(spec, size)
    default = _default_work(spec, size, works)
    groups, pixels = _default_block(spec, size, works[default])
    powers = [number for number in _PIXELS if number <= size.max_block_pixels]
    whole = divisors(size.max_block_pixels, _PIXELS[-1]) if size.image_is_static else []

    work = works[space.pick("thread", list(works), default)]
    groups = space.pick("groups", divisors(spec.group), groups)
    pixels = space.pick("pixels", [*powers, *whole], pixels)
    fits = groups % work.groups == 0 and pixels % work.columns == 0
    if work.sharing_threads > 1 and not (fits and size.divides_into(pixels)):
        raise DecisionError(
            "threads can share points only in blocks without absent pixels",
            got=f"{groups} groups, {pixels} pixels of {size.max_block_pixels}",
            allowed=f"a multiple of {work.groups} groups, and a multiple of {work.columns} pixels "
            "that divides the image",
        )
    return BlockTile(work, groups, pixels)


def _thread_works(spec: DCNv3Spec, size: OutputSize) -> dict[str, ThreadWork]:
    """Return the candidates for the work of a thread, in increasing order of work."""
    vectors = _vectors(spec)
    works = {"one_vector": ThreadWork()}
    if vectors % 2 == 0:
        works["two_vectors"] = ThreadWork(vectors=2)
    # With one point: see tvm_workarounds: warp-in-place.
    can_share = vectors in SHUFFLE_WIDTHS and spec.group_channels <= _MAX_SUMS and spec.points > 1
    if size.image_is_static and can_share:
        if spec.group % vectors == 0:
            works["share_points"] = ThreadWork(groups=vectors)
        elif (size.columns or 0) % vectors == 0:
            works["share_points"] = ThreadWork(columns=vectors)
    return works


def _default_work(spec: DCNv3Spec, size: OutputSize, works: dict[str, ThreadWork]) -> str:
    """Choose the most work of a thread that still leaves enough threads for a large GPU."""
    for name, work in reversed(works.items()):
        channels = work.vectors * work.sharing_threads * spec.group_channels // _vectors(spec)
        enough = size.pixels * spec.channels >= channels * gpu.FULL_GPU_THREADS
        _, pixels = _default_block(spec, size, work)
        if enough and (work.sharing_threads == 1 or size.divides_into(pixels)):
            return name
    return "one_vector"


def _default_block(spec: DCNv3Spec, size: OutputSize, work: ThreadWork) -> tuple[int, int]:
    """Choose the groups and pixels of a block of about `_THREADS` threads."""
    group_threads = _vectors(spec) // work.vectors
    # All groups if possible, which saves the instructions that locate a part of them.
    groups = max(divisors(spec.group // work.groups, max(1, _THREADS // group_threads)))
    columns = None if size.columns is None else size.columns // work.columns
    wanted = max(_MIN_PIXELS, _THREADS // (groups * group_threads))
    pixels = _block_pixels(size.rows, columns, wanted)
    return groups * work.groups, pixels * work.columns


def _block_pixels(rows: int | None, columns: int | None, wanted: int) -> int:
    """Choose about `wanted` pixels, a divisor of the image if there is one."""
    power = 1 << (wanted.bit_length() - 1)
    if rows is None or columns is None:
        return power
    fitting = [d for d in divisors(rows * columns, 2 * wanted) if 2 * d >= wanted]
    return min(fitting, key=lambda d: abs(d - wanted), default=min(power, rows * columns))


def _vectors(spec: DCNv3Spec) -> int:
    """Return the number of vectors of the channels of a group."""
    return spec.group_channels // gpu.vector_elements(spec.group_channels, spec.dtype)
