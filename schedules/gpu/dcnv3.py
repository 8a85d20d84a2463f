"""DCNv3 on GPUs: a thread gathers 16-byte vectors of channels, and sums them in registers."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Final

from tvm import s_tir, tirx
from tvm.s_tir.schedule import LoopRV, SBlockRV
from tvm.target import Target

from dcnv3_tvm import gpu
from dcnv3_tvm.op.expr import static
from dcnv3_tvm.op.tensorir import gathering, spec_of
from dcnv3_tvm.schedules.gpu.launch import set_min_blocks
from dcnv3_tvm.schedules.gpu.loops import bind_blocks, divisors, unroll_all, vectorize_copy
from dcnv3_tvm.schedules.rule import Refusal, refuse_other_kernels
from dcnv3_tvm.schedules.space import DecisionError, SearchSpace
from dcnv3_tvm.spec import DCNv3Spec

_KERNELS: Final = ("dcnv3", "dcnv3_packed")

_THREADS: Final = 128
"""Threads of a block; those of a pixel, where there are more, lie in several."""

_PIXELS: Final = (1, 2, 4, 8, 16, 32, 64, 128)
"""Pixels of a block among which a tuner may choose."""

_OPEN_SIDE: Final = 64
"""Rows or columns where they are known only at run time."""

_MAX_UNROLLED_POINTS: Final = 16
"""Beyond, the loop over the points stays a loop."""

_PARTNERS: Final = (2, 4, 8)
"""Threads that may be partners: shuffles are among so many."""

_MOST_SUMS: Final = 32
"""Channels that a thread may sum, all its outputs together."""

# Consumers before producers: the order in which compute_at moves them. How many loops lie inside
# that over the groups.
_PER_POINT: Final = {"pixels": 1, "weights": 3, "corners": 1, "coordinates": 1}
_PER_GROUP: Final = {"gate": 0, "softmax_sum": 1, "softmax_exp": 1, "softmax_max": 1}


def dcnv3(func: tirx.PrimFunc, target: Target, space: SearchSpace) -> tirx.PrimFunc | Refusal:
    """Schedule the DCNv3 kernels of `dcnv3_tvm.op.tensorir`.

    A block takes a run of pixels and some of the groups; a thread takes one or two vectors of the
    channels of a group at one pixel. Point by point it computes coordinates and the four weights,
    loads the four pixels, a vector at a time, and adds them to its sums: nothing but the sums and
    the softmax lives longer than a point, so that many threads fit, and their loads overlap.

    What binds the kernel is the number of instructions: a conversion and a multiply-add for each
    channel and corner, and the coordinates. So these are computed but once for 16 channels. If one
    thread takes them all, as two vectors, each of its loads uses half of the 32-byte sectors that
    it touches, and the L1 cache binds. So partners, the threads with the vectors of a group, take
    one vector each at as many outputs, which are neighbours along the groups or the columns; each
    computes the coordinates, weights and softmax of one of these, and hears of the others by
    shuffles. That is left to blocks without absent pixels, for shuffles need all threads.

    Parameters
    ----------
    func : tvm.tirx.PrimFunc
        Any unscheduled function.
    target : tvm.target.Target
        The target.
    space : SearchSpace
        What to decide otherwise than by default.

    Returns
    -------
    tvm.tirx.PrimFunc or Refusal
        The scheduled function; a refusal of other kernels.
    """
    if refusal := refuse_other_kernels(func, *_KERNELS):
        return refusal
    spec = spec_of(func)
    sch = s_tir.Schedule(gathering(func))
    names = {sch.get(block).name_hint for block in sch.get_child_blocks(sch.get_sblock("root"))}
    vector = gpu.vector_elements(spec.group_channels, spec.dtype)
    store, total = sch.get_sblock("store"), sch.get_sblock("sum")
    # Before the loops are tiled: bounds are lost where a cache is made of a part of an output.
    copy = sch.cache_write(store, 0, "local")
    sizes = [static(sch.get(loop).extent) for loop in sch.get_loops(store)[:3]]
    tile = _choose(spec, sizes, space)
    partners = tile.work.partners
    thread, output = _share_out(sch, store, spec, tile)
    sch.reverse_compute_at(copy, output, preserve_unit_loops=True)
    vectorize_copy(sch, copy, vector)

    sch.compute_at(total, thread, preserve_unit_loops=True)
    sch.set_scope(total, 0, "local")
    *_, pixel, group, point, row, column, channel = sch.get_loops(total)
    sch.reorder(point, pixel, group)
    unroll_all(sch, [pixel, group, row, column, channel])
    patch, coordinates = sch.get_sblock("patch"), sch.get_sblock("coordinates")
    offset = sch.cache_read(coordinates, 0, "local", [coordinates])
    _compute_at(sch, patch, group, 3)
    for name, loops in _PER_POINT.items():
        own = _compute_at(sch, sch.get_sblock(name), point, loops, partners)
    # The two of a point at once: they are neighbours, and so aligned.
    sch.compute_at(offset, own, preserve_unit_loops=True)
    sch.vectorize(sch.get_loops(offset)[-1])
    for name, loops in _PER_GROUP.items():
        if name in names:
            _compute_at(sch, sch.get_sblock(name), thread, loops, partners)
    if spec.points <= _MAX_UNROLLED_POINTS:
        sch.unroll(point)
    init = sch.decompose_reduction(total, point)
    unroll_all(sch, sch.get_loops(init)[-3:])
    for name in ("softmax_sum", "softmax_max"):
        if name in names:
            block = sch.get_sblock(name)
            sch.decompose_reduction(block, sch.get_loops(block)[-1])
    vectorize_copy(sch, patch, vector)
    if "center" in names:
        center = sch.get_sblock("center")
        _compute_at(sch, center, thread, 1)
        vectorize_copy(sch, center, vector)
    return set_min_blocks(sch.mod["main"], target, space)


@dataclasses.dataclass(frozen=True)
class _Work:
    """What a thread takes.

    Parameters
    ----------
    vectors : int
        Vectors of the channels of a group.
    columns, groups : int
        Outputs along these axes: as many as the thread has partners, itself included.
    """

    vectors: int = 1
    columns: int = 1
    groups: int = 1

    @property
    def partners(self) -> int:
        """Threads that share out the points of a group."""
        return self.columns * self.groups


@dataclasses.dataclass(frozen=True)
class _Tile:
    """What a thread and a block take.

    Parameters
    ----------
    work : _Work
        What a thread takes.
    groups, pixels : int
        What a block takes.
    """

    work: _Work
    groups: int
    pixels: int


def _choose(spec: DCNv3Spec, sizes: Sequence[int | None], space: SearchSpace) -> _Tile:
    """Choose a tile of an output of so many images, rows and columns; None is an open size."""
    images, rows, columns = sizes
    known = rows is not None and columns is not None
    # Not more pixels of a block than an image has: where it knows that there is one row and one
    # column, TVM checks nothing, and the threads of pixels that are not there would store, too.
    image = (rows or _PIXELS[-1]) * (columns or _PIXELS[-1])
    outputs = (images or 1) * (rows or _OPEN_SIDE) * (columns or _OPEN_SIDE)
    vector = gpu.vector_elements(spec.group_channels, spec.dtype)
    vectors = spec.group_channels // vector
    works = {"vector": _Work()}
    if vectors % 2 == 0:
        works["vectors"] = _Work(vectors=2)
    if known and vectors in _PARTNERS and spec.group_channels <= _MOST_SUMS:
        if spec.group % vectors == 0:
            works["partners"] = _Work(groups=vectors)
        elif columns is not None and columns % vectors == 0:
            works["partners"] = _Work(columns=vectors)

    def block(work: _Work) -> tuple[int, int]:
        """Return how many groups and pixels a block takes by default."""
        lanes = vectors // work.vectors
        # All groups if possible: it takes instructions to find which part of them a block has.
        groups = max(divisors(spec.group // work.groups, max(1, _THREADS // lanes)))
        runs = columns and columns // work.columns
        # With two pixels ptxas was seen to need fewer registers than with one.
        pixels = _run(rows, runs, max(2, _THREADS // (groups * lanes)))
        return groups * work.groups, pixels * work.columns

    def is_whole(pixels: int) -> bool:
        return known and image % pixels == 0

    def suits(work: _Work) -> bool:
        enough = work.vectors * work.partners * vector * gpu.FULL_GPU_THREADS
        whole = work.partners == 1 or is_whole(block(work)[1])
        return whole and outputs * spec.channels >= enough

    default = next((name for name in reversed(works) if suits(works[name])), "vector")
    groups, pixels = block(works[default])
    powers = [number for number in _PIXELS if number <= image]
    whole = divisors(image, _PIXELS[-1]) if known else []

    work = works[space.pick("thread", list(works), default)]
    groups = space.pick("groups", divisors(spec.group), groups)
    pixels = space.pick("pixels", [*powers, *whole], pixels)
    if work.partners > 1 and (
        groups % work.groups or pixels % work.columns or not is_whole(pixels)
    ):
        raise DecisionError(
            "partners need whole blocks",
            got=f"{groups} groups, {pixels} pixels of {image}",
            allowed=f"multiples of {work.groups} and {work.columns}, and no pixel absent",
        )
    return _Tile(work, groups, pixels)


def _share_out(
    sch: s_tir.Schedule, store: SBlockRV, spec: DCNv3Spec, tile: _Tile
) -> tuple[LoopRV, LoopRV]:
    """Share out the loops of the last block among blocks and threads.

    Returns the innermost loop of threads, and the innermost over the outputs of a thread.
    """
    work, vector = tile.work, gpu.vector_elements(spec.group_channels, spec.dtype)
    batch, row, column, group, channel = sch.get_loops(store)
    known = all(static(sch.get(loop).extent) is not None for loop in (row, column))
    lane, *inner = sch.split(channel, [None, work.vectors, vector])
    slab, group, own_groups = sch.split(group, [None, tile.groups // work.groups, work.groups])
    column, own_columns = sch.split(column, [None, work.columns])
    if known:
        place, pixel = sch.split(sch.fuse(row, column), [None, tile.pixels // work.columns])
        outer, places = [batch], [slab, place]
    else:  # Pixels of one row: so a thread need not divide by what is not known.
        place, pixel = sch.split(column, [None, tile.pixels])
        outer, places = [batch, row], [place, slab]
    own = [own_columns, own_groups, *inner]
    sch.reorder(*outer, *places, pixel, group, lane, *own)
    unroll_all(sch, own)
    bind_blocks(sch, outer, places)
    if work.partners > 1:
        sch.bind(sch.fuse(pixel, group), "threadIdx.y")
    else:
        lane = sch.fuse(pixel, group, lane)
    sch.bind(lane, "threadIdx.x")
    return lane, own_groups


def _run(rows: int | None, columns: int | None, wanted: int) -> int:
    """Choose how many pixels a block takes: some that divide an image, so that none is cut off."""
    power = 1 << (wanted.bit_length() - 1)
    if rows is None or columns is None:
        return power
    fitting = [d for d in divisors(rows * columns, 2 * wanted) if 2 * d >= wanted]
    return min(fitting, key=lambda d: abs(d - wanted), default=min(power, rows * columns))


def _compute_at(
    sch: s_tir.Schedule, block: SBlockRV, loop: LoopRV, inner: int, partners: int = 1
) -> LoopRV:
    """Compute a block in registers, its innermost loops unrolled.

    Partners share out its outputs. Returns the loop over these.
    """
    for index in range(len(sch.get(block).writes)):
        sch.set_scope(block, index, "warp" if partners > 1 else "local")
    sch.compute_at(block, loop, preserve_unit_loops=True)
    *_, columns, groups = sch.get_loops(block)[: -inner or None]
    unroll_all(sch, sch.get_loops(block)[-inner:] if inner else [])
    own = sch.fuse(columns, groups)
    if partners > 1:
        sch.bind(own, "threadIdx.x")
    else:
        sch.unroll(own)
    return own
