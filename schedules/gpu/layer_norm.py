"""LayerNorm on GPUs: threads of a row keep it in registers and reduce it by warp shuffles."""

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
"""Candidates for the threads of a row."""

_THREADS: Final = 128
"""Threads of a block, unless a row needs more."""

_ROWS: Final = (1, 2, 4, 8, 16, 32, 64, 128)
"""Candidates for the rows of a block."""

_WARP_ELEMENTS: Final = 80
"""Elements of a row a thread above which a row gets a second warp."""

_MOST_ELEMENTS: Final = 128
"""Most elements of a row a thread, all in registers."""


def layer_norm(func: tirx.PrimFunc, target: Target, space: SearchSpace) -> tirx.PrimFunc | Refusal:
    """Schedule LayerNorm over contiguous channels.

    A row is read once, in vectors, by neighbouring threads of a warp or by several warps. Each
    thread keeps its elements in registers until it stores them.
    """
    if refusal := refuse_other_kernels(func, "layer_norm"):
        return refusal
    # Step 1. Choose the vector and the threads of a row.
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

    # Step 2. Bind rows to blocks.
    sch = s_tir.Schedule(func)
    epilogue = sch.get_sblock("epilogue")
    row, channel = sch.get_loops(epilogue)
    rows = space.pick("rows", _ROWS, max(1, _THREADS // lanes)) if lanes <= WARP_SIZE else 1
    block, row = sch.split(row, [None, rows])
    sch.bind(block, "blockIdx.x")
    sch.bind(row, "threadIdx.y")

    # Step 3. Bind channels to threads, from the output back to the input.
    threads = ChannelThreads.of(space, lanes, vector)
    threads.store(sch, epilogue, channel)
    threads.reduce(sch, row)
    _load_row(sch, threads, row)
    return set_min_blocks(sch.mod["main"], target, space)


def _load_row(sch: s_tir.Schedule, threads: ChannelThreads, row: LoopRV) -> None:
    """Load a row into registers, converted to the type of the computation."""
    readers = [sch.get_sblock(name) for name in ("total", "square", "epilogue")]
    (conversion,) = sch.get_producers(readers[0]) or [None]
    loaded = conversion or sch.cache_read(readers[0], 0, "local", readers)
    sch.compute_at(loaded, row, preserve_unit_loops=True)
    step = threads.split(sch, sch.get_loops(loaded)[-1])
    if conversion is None:
        vectorize_copy(sch, loaded, threads.vector)
    else:
        sch.set_scope(loaded, 0, "local")
        sch.unroll(sch.get_loops(loaded)[-1])
        threads.load(sch, loaded, step, ("x",))


@dataclasses.dataclass(frozen=True)
class ChannelThreads:
    """How the channels of a row are distributed over threads.

    Parameters
    ----------
    lanes : int
        Threads of a row.
    vector : int
        Neighbouring channels that a thread loads at once.
    scope : str
        Scope of the sums of a row: ``"local"`` in a warp, which reduces by shuffles, else
        ``"shared"``. With several warps a block must have only one row. See tvm_workarounds:
        shared-memory-barrier.
    """

    lanes: int
    vector: int
    scope: str

    @classmethod
    def of(cls, space: SearchSpace, lanes: int, vector: int) -> ChannelThreads:
        """Decide the threads of a row, by default `lanes`."""
        warp = lanes <= WARP_SIZE
        candidates = [count for count in LANES if (count <= WARP_SIZE) == warp]
        return cls(space.pick("lanes", candidates, lanes), vector, "local" if warp else "shared")

    def split(self, sch: s_tir.Schedule, channel: LoopRV, inside: Sequence[LoopRV] = ()) -> LoopRV:
        """Bind a loop over the channels to threads, and return the loop over a thread's vectors.

        The loops `inside` are moved between the thread loop and its vectors.
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
        """Bind the last block to threads: it computes vectors in registers and stores them.

        Its parameters are loaded in vectors too.
        """
        step = self.split(sch, channel, inside)
        sch.unroll(sch.get_loops(block)[-1])
        # Indexed by the axes of the block. See tvm_workarounds: cache-write-bounds.
        rank = len(sch.get(block).iter_vars)
        place = IndexMap.from_func(lambda *index: index, ndim=rank, index_dtype="int64")
        copy = sch.reindex_cache_write(block, 0, "local", place)
        sch.reverse_compute_at(copy, step, preserve_unit_loops=True)
        vectorize_copy(sch, copy, self.vector)
        self.load(sch, block, step, ("gamma", "beta", "residual"))

    def load(
        self, sch: s_tir.Schedule, block: SBlockRV, loop: LoopRV, names: Sequence[str]
    ) -> None:
        """Load the named parameters of a block into registers at a loop, in vectors."""
        for index, region in enumerate(sch.get(block).reads):
            if region.source.name in names:
                copy = sch.cache_read(block, index, "local")
                sch.compute_at(copy, loop, preserve_unit_loops=True)
                vectorize_copy(sch, copy, self.vector)

    def reduce(self, sch: s_tir.Schedule, row: LoopRV) -> None:
        """Compute the mean and variance of a LayerNorm at the loop `row`."""
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
            # Unrolled by nvcc. See tvm_workarounds: allreduce-copies.
            sch.annotate(place, "pragma_unroll_explicit", 0)


def _lanes(vectors: int, vector: int) -> int:
    """Choose the threads of a row of `vectors` vectors of `vector` elements.

    As few idle threads as possible, then close to a warp; several warps only if the elements would
    not fit the registers of one.
    """
    candidates = [lanes for lanes in LANES if lanes < 2 * vectors]

    def cost(lanes: int) -> tuple[bool, int, int]:
        steps = -(-vectors // lanes)
        return steps * vector > _WARP_ELEMENTS, steps * lanes, abs(lanes - WARP_SIZE)

    return min(candidates, key=cost)
