"""LayerNorm on GPUs: some threads share a row, keep it in registers, and add by shuffles."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Final

from tvm import s_tir, tirx
from tvm.s_tir.schedule import LoopRV, SBlockRV
from tvm.target import Target
from tvm.tirx import IndexMap

from dcnv3_tvm.gpu import WARP_SIZE, vector_elements
from dcnv3_tvm.op.expr import static
from dcnv3_tvm.schedules.gpu.launch import set_min_blocks
from dcnv3_tvm.schedules.gpu.loops import unroll_all, vectorize_copy
from dcnv3_tvm.schedules.rule import Refusal, refuse_other_kernels
from dcnv3_tvm.schedules.space import SearchSpace

LANES: Final = (1, 2, 4, 8, 16, 32, 64, 128, 256)
"""Numbers of threads that may share the channels."""

_THREADS: Final = 128
"""Threads of a block."""

_ROWS: Final = (1, 2, 4, 8, 16, 32, 64, 128)
"""Rows of a block among which a tuner may choose."""

_ROW_ELEMENTS: Final = 80
"""Elements of a row that a thread takes before a second warp helps."""

_MOST_ELEMENTS: Final = 128
"""Elements of a row that a thread can take: more would not fit its registers."""


def layer_norm(func: tirx.PrimFunc, target: Target, space: SearchSpace) -> tirx.PrimFunc | Refusal:
    """Schedule LayerNorm over contiguous channels.

    A row is read once, in vectors. The threads that share it are neighbours in a warp, or some
    whole warps; each keeps its part in registers until it is stored.
    """
    if refusal := refuse_other_kernels(func, "layer_norm"):
        return refusal
    x, out = func.params[0], func.params[-1]
    channels = static(x.shape[-1])
    if channels is None:
        return Refusal(f"needs a static number of channels; got {x.shape[-1]}")
    vector = vector_elements(channels, str(x.dtype), str(out.dtype))
    vectors = channels // vector
    lanes = _lanes(vectors, vector)
    elements = -(-vectors // lanes) * vector
    if elements > _MOST_ELEMENTS:
        return Refusal(
            f"keeps at most {_MOST_ELEMENTS} elements of a row in the registers of a thread; "
            f"{channels} channels need {elements}"
        )
    sch = s_tir.Schedule(func)
    epilogue = sch.get_sblock("epilogue")
    row, channel = sch.get_loops(epilogue)
    rows = space.pick("rows", _ROWS, max(1, _THREADS // lanes)) if lanes <= WARP_SIZE else 1
    block, row = sch.split(row, [None, rows])
    sch.bind(block, "blockIdx.x")
    sch.bind(row, "threadIdx.y")
    shared = Channels.of(space, lanes, vector)
    shared.store(sch, epilogue, channel)
    shared.normalize(sch, row)
    _read(sch, shared, row)
    return set_min_blocks(sch.mod["main"], target, space)


def _read(sch: s_tir.Schedule, shared: Channels, row: LoopRV) -> None:
    """Read a row into registers, where it is in the type of the computation."""
    readers = [sch.get_sblock(name) for name in ("total", "square", "epilogue")]
    (producer,) = sch.get_producers(readers[0]) or [None]
    given = producer or sch.cache_read(readers[0], 0, "local", readers)
    sch.compute_at(given, row, preserve_unit_loops=True)
    step = shared.split(sch, sch.get_loops(given)[-1])
    if producer is None:
        vectorize_copy(sch, given, shared.vector)
    else:
        sch.set_scope(given, 0, "local")
        sch.unroll(sch.get_loops(given)[-1])
        shared.load(sch, given, step, ("x",))


@dataclasses.dataclass(frozen=True)
class Channels:
    """How the channels of a row are shared out among threads.

    Parameters
    ----------
    lanes : int
        Threads that share a row.
    vector : int
        Neighbouring channels that a thread takes together.
    scope : str
        Where the sums of a row go: each thread of a warp gets them by shuffles; more warps need
        shared memory. Then a block must have one row at a time: TVM takes an element of shared
        memory that depends on another thread index for a thread's own, and leaves out the barrier.
    """

    lanes: int
    vector: int
    scope: str

    @classmethod
    def of(cls, space: SearchSpace, lanes: int, vector: int) -> Channels:
        """Choose the threads of a row, by default `lanes`."""
        warp = lanes <= WARP_SIZE
        candidates = [count for count in LANES if (count <= WARP_SIZE) == warp]
        return cls(space.pick("lanes", candidates, lanes), vector, "local" if warp else "shared")

    def split(self, sch: s_tir.Schedule, channel: LoopRV, inside: Sequence[LoopRV] = ()) -> LoopRV:
        """Give a loop over the channels to threads, and return the loop of a thread's vectors.

        The loops `inside` come between the threads and their vectors.
        """
        step, lane, element = sch.split(channel, [None, self.lanes, self.vector])
        sch.reorder(lane, *inside, step, element)
        sch.bind(lane, "threadIdx.x")
        unroll_all(sch, [*inside, step])
        return step

    def store(
        self,
        sch: s_tir.Schedule,
        block: SBlockRV,
        channel: LoopRV,
        inside: Sequence[LoopRV] = (),
    ) -> None:
        """Share out the last block: vectors are computed in registers, and then stored.

        What it reads of the parameters comes in vectors too.
        """
        step = self.split(sch, channel, inside)
        sch.unroll(sch.get_loops(block)[-1])
        # By the indices of the block: by those of an output of more dimensions, TVM loses sight of
        # its bounds where the only block of threads is not full.
        rank = len(sch.get(block).iter_vars)
        place = IndexMap.from_func(lambda *index: index, ndim=rank, index_dtype="int64")
        copy = sch.reindex_cache_write(block, 0, "local", place)
        sch.reverse_compute_at(copy, step, preserve_unit_loops=True)
        vectorize_copy(sch, copy, self.vector)
        self.load(sch, block, step, ("gamma", "beta", "residual"))

    def load(
        self, sch: s_tir.Schedule, block: SBlockRV, loop: LoopRV, names: Sequence[str]
    ) -> None:
        """Load what a block reads of some parameters into registers, at a loop, in vectors."""
        for index, region in enumerate(sch.get(block).reads):
            if region.source.name in names:
                copy = sch.cache_read(block, index, "local")
                sch.compute_at(copy, loop, preserve_unit_loops=True)
                vectorize_copy(sch, copy, self.vector)

    def normalize(self, sch: s_tir.Schedule, row: LoopRV) -> None:
        """Compute the sums of a LayerNorm at the loop `row`, of a thread's rows."""
        scale = sch.get_sblock("scale")
        sch.compute_at(scale, row, preserve_unit_loops=True)
        sch.set_scope(scale, 0, "local")
        sch.unroll(sch.get_loops(scale)[-1])
        for name in ("square", "total"):
            block = sch.get_sblock(name)
            sch.compute_at(block, row, preserve_unit_loops=True)
            sch.set_scope(block, 0, self.scope)
            *_, place, channel = sch.get_loops(block)
            self.split(sch, channel)
            unroll_all(sch, [place, sch.get_loops(block)[-1]])
            # By the CUDA compiler: TVM lowers no second copy of a sum over threads.
            sch.annotate(place, "pragma_unroll_explicit", 0)


def _lanes(vectors: int, vector: int) -> int:
    """Choose the threads of a row of `vectors` vectors of `vector` elements.

    As few idle ones as possible, then as many as possible, which is as many rows in flight; a
    second warp only if one would have to keep too much.
    """
    candidates = [lanes for lanes in LANES if lanes < 2 * vectors]

    def cost(lanes: int) -> tuple[bool, int, int]:
        steps = -(-vectors // lanes)
        return steps * vector > _ROW_ELEMENTS, steps * lanes, abs(lanes - WARP_SIZE)

    return min(candidates, key=cost)
