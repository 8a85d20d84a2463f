"""DCNv3 on GPUs: a thread gathers 16-byte vectors of channels, and sums them in registers."""

from __future__ import annotations

import math
from typing import Final

from tvm import s_tir, tirx
from tvm.s_tir.schedule import LoopRV, SBlockRV
from tvm.target import Target

from dcnv3_tvm.op.stages import static
from dcnv3_tvm.op.tensorir import KERNEL_ATTR, gathering, spec_of
from dcnv3_tvm.schedules.choices import Choices
from dcnv3_tvm.schedules.gpu.threads import (
    VECTOR_BYTES,
    bind_blocks,
    divisors,
    unroll_all,
    vectorize_copy,
)
from dcnv3_tvm.spec import DTYPE_BYTES, DCNv3Spec
from dcnv3_tvm.targets import is_gpu

_KERNELS: Final = ("dcnv3", "dcnv3_packed")

_THREADS: Final = 128
"""Threads of a block."""

_LANES: Final = 32
"""Most threads of a block that share a pixel."""

_PIXELS: Final = (1, 2, 4, 8, 16, 32, 64, 128)
"""Pixels of a block among which a tuner may choose."""

_FULL_GPU: Final = 2**17
"""Threads that fill a large GPU once; where there are fewer, each takes less."""

_OPEN_SIDE: Final = 64
"""Rows or columns where they are known only at run time."""

_MAX_UNROLLED_POINTS: Final = 16
"""Beyond, the loop over the points stays a loop."""

# Consumers before producers: the order in which compute_at moves them. How many of the innermost
# loops there are to unroll.
_PER_POINT: Final = {"patch": 3, "pixels": 1, "weights": 3, "corners": 1, "coordinates": 1}
_PER_GROUP: Final = {"center": 1, "gate": 1, "softmax_sum": 1, "softmax_exp": 1, "softmax_max": 1}


def dcnv3(func: tirx.PrimFunc, target: Target, choices: Choices) -> tirx.PrimFunc | None:
    """Schedule the DCNv3 kernels of `dcnv3_tvm.op.tensorir`.

    A block takes a run of pixels and some of the groups; a thread takes one or two vectors of the
    channels of a group at one pixel. Point by point it computes coordinates and the four weights,
    loads the four pixels, a vector at a time, and adds them to its sums: nothing but the sums and
    the softmax lives longer than a point, so that many threads fit, and their loads overlap.

    What binds the kernel is the number of instructions, not memory: a conversion and a
    multiply-add for each channel and corner, and the coordinates, which two vectors share.

    Parameters
    ----------
    func : tvm.tirx.PrimFunc
        Any unscheduled function.
    target : tvm.target.Target
        The target.
    choices : Choices
        What to decide otherwise than by default.

    Returns
    -------
    tvm.tirx.PrimFunc or None
        The scheduled function, or None if it is no DCNv3 kernel or the target is no GPU.
    """
    if func.attrs is None or func.attrs.get(KERNEL_ATTR) not in _KERNELS or not is_gpu(target):
        return None
    spec = spec_of(func)
    sch = s_tir.Schedule(gathering(func))
    names = {sch.get(block).name_hint for block in sch.get_child_blocks(sch.get_sblock("root"))}
    vector = math.gcd(spec.group_channels, VECTOR_BYTES // DTYPE_BYTES[spec.dtype])
    store, total = sch.get_sblock("store"), sch.get_sblock("sum")
    # Before the loops are tiled: bounds are lost where a cache is made of a part of an output.
    copy = sch.cache_write(store, 0, "local")
    thread = _tile(sch, store, spec, vector, choices)
    sch.reverse_compute_at(copy, thread, preserve_unit_loops=True)
    vectorize_copy(sch, copy, vector)

    sch.compute_at(total, thread, preserve_unit_loops=True)
    sch.set_scope(total, 0, "local")
    point, *corner, channel = sch.get_loops(total)[-4:]
    unroll_all(sch, [*corner, channel])
    coordinates = sch.get_sblock("coordinates")
    offset = sch.cache_read(coordinates, 0, "local", [coordinates])
    for name, loops in _PER_POINT.items():
        if name in names:
            _compute_at(sch, sch.get_sblock(name), point, loops)
    # The two of a point at once: they are neighbours, and so aligned.
    sch.compute_at(offset, point, preserve_unit_loops=True)
    sch.vectorize(sch.get_loops(offset)[-1])
    for name, loops in _PER_GROUP.items():
        if name in names:
            _compute_at(sch, sch.get_sblock(name), thread, loops)
    if spec.points <= _MAX_UNROLLED_POINTS:
        sch.unroll(point)
    init = sch.decompose_reduction(total, point)
    sch.unroll(sch.get_loops(init)[-1])
    for name in ("softmax_sum", "softmax_max"):
        if name in names:
            block = sch.get_sblock(name)
            sch.decompose_reduction(block, sch.get_loops(block)[-1])
    for name in ("patch", "center"):
        if name in names:
            vectorize_copy(sch, sch.get_sblock(name), vector)
    return sch.mod["main"]


def _tile(
    sch: s_tir.Schedule, store: SBlockRV, spec: DCNv3Spec, vector: int, choices: Choices
) -> LoopRV:
    """Share out the loops of the last block among blocks and threads; return the latter's loop."""
    batch, row, column, group, channel = sch.get_loops(store)
    vectors = spec.group_channels // vector
    amounts = [amount for amount in (1, 2) if vectors % amount == 0]
    images, rows, columns = (static(sch.get(loop).extent) for loop in (batch, row, column))
    outputs = (images or 1) * (rows or _OPEN_SIDE) * (columns or _OPEN_SIDE)
    enough = outputs * spec.channels >= amounts[-1] * vector * _FULL_GPU
    amount = amounts[-1] if enough else 1
    lanes = vectors // amount
    groups = max(divisors(spec.group, max(1, _LANES // lanes)))
    pixels = _run(rows, columns, max(1, _THREADS // (groups * lanes)))
    # Not more pixels than an image has: where it knows that there is one row and one column, TVM
    # checks nothing, and the threads of pixels that are not there would store, too.
    image = math.prod(size or _PIXELS[-1] for size in (rows, columns))
    runs = [number for number in _PIXELS if number <= image]

    amount = choices.pick("vectors", amounts, amount)
    groups = choices.pick("groups", divisors(spec.group), groups)
    pixels = choices.pick("pixels", runs, pixels)
    lane, *inner = sch.split(channel, [None, amount, vector])
    slab, group = sch.split(group, [None, groups])
    if rows is not None and columns is not None:
        block, pixel = sch.split(sch.fuse(row, column), [None, pixels])
        outer, places = [batch], [slab, block]
    else:  # Pixels of one row: so a thread need not divide by what is not known.
        block, pixel = sch.split(column, [None, pixels])
        outer, places = [batch, row], [block, slab]
    sch.reorder(*outer, *places, pixel, group, lane, *inner)
    unroll_all(sch, inner)
    bind_blocks(sch, outer, places)
    thread = sch.fuse(pixel, group, lane)
    sch.bind(thread, "threadIdx.x")
    return thread


def _run(rows: int | None, columns: int | None, wanted: int) -> int:
    """Choose how many pixels a block takes: some that divide an image, so that none is cut off."""
    power = 1 << (wanted.bit_length() - 1)
    if rows is None or columns is None:
        return power
    fitting = [d for d in divisors(rows * columns, 2 * wanted) if 2 * d >= wanted]
    return min(fitting, key=lambda d: abs(d - wanted), default=min(power, rows * columns))


def _compute_at(sch: s_tir.Schedule, block: SBlockRV, loop: LoopRV, loops: int) -> None:
    """Compute a block in registers, its innermost loops unrolled."""
    sch.compute_at(block, loop, preserve_unit_loops=True)
    for index in range(len(sch.get(block).writes)):
        sch.set_scope(block, index, "local")
    unroll_all(sch, sch.get_loops(block)[-loops:])
