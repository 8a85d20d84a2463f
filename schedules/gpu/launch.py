"""Launch configuration of a scheduled kernel: thread extents, their limit, and min blocks."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Final

import tvm_ffi
from tvm import tirx
from tvm.target import Target

from dcnv3_tvm.gpu import MAX_BLOCK_THREADS
from dcnv3_tvm.schedules.space import DecisionError, SearchSpace
from dcnv3_tvm.targets import gpu_architecture

_MIN_BLOCKS: Final = "tirx.launch_bounds_min_blocks_per_sm"
"""TVM's name for the second argument of CUDA's ``__launch_bounds__``."""

_OPEN: Final = 0

_CANDIDATES: Final = (_OPEN, 1, 2, 3, 4, 6, 8, 12, 16)


def launches(func: tirx.PrimFunc) -> list[dict[str, str]]:
    """Return how the kernels of a scheduled function are started: extents by thread axis."""
    kernels: list[dict[str, str]] = []

    def visit(loop: tirx.For) -> None:
        if loop.thread_binding is None:
            return
        axis = str(loop.thread_binding.thread_tag)
        if not kernels or axis == "blockIdx.x":
            kernels.append({})
        kernels[-1].setdefault(axis, re.sub(r"T\.int64\((-?\d+)\)", r"\1", str(loop.extent)))

    tvm_ffi.structural_walk(func.body, (tirx.For, visit), order="pre")
    return kernels


def block_threads(extents: Mapping[str, str]) -> int:
    """Count the threads of a block, of one of `launches`."""
    return math.prod(
        int(extent)
        for axis, extent in extents.items()
        if axis.startswith("threadIdx") and extent.isdecimal()
    )


def check_launch(func: tirx.PrimFunc) -> None:
    """Refuse a scheduled function whose blocks ask for more threads than a GPU gives them.

    Raises
    ------
    DecisionError
        If it does.
    """
    for extents in launches(func):
        threads = block_threads(extents)
        if threads > MAX_BLOCK_THREADS:
            raise DecisionError(
                "a block has too many threads", got=threads, allowed=f"up to {MAX_BLOCK_THREADS}"
            )


def bound_registers(
    func: tirx.PrimFunc, target: Target, space: SearchSpace, default: int = _OPEN
) -> tirx.PrimFunc:
    """Decide for how many blocks of a scheduled kernel a multiprocessor must have room.

    More blocks hide more of the time that loads take; but they share the registers, and what a
    thread has no register for goes to memory. Where nothing is decided, ptxas weighs the two.

    Parameters
    ----------
    func : tvm.tirx.PrimFunc
        One kernel, its loops bound to threads.
    target : tvm.target.Target
        The GPU.
    space : SearchSpace
        What to decide otherwise than by default.
    default : int
        Blocks; 0 leaves it to ptxas.
    """
    wanted = space.pick("min_blocks", _CANDIDATES, default)
    if wanted == _OPEN:
        return func
    (extents,) = launches(func)
    threads, architecture = block_threads(extents), gpu_architecture(target)
    # A block can have too many threads for any to fit; that is refused later, for all rules.
    blocks = max(1, min(wanted, architecture.blocks, architecture.threads // threads))

    def bound(loop: tirx.For) -> tirx.For:
        if loop.thread_binding is None or loop.thread_binding.thread_tag != "blockIdx.x":
            return loop
        # Inside the first loop of the kernel: what stands around it stays on the host.
        body = tirx.AttrStmt(0, _MIN_BLOCKS, blocks, loop.body)
        return tirx.For(
            loop.loop_var,
            loop.min,
            loop.extent,
            loop.kind,
            body,
            loop.thread_binding,
            loop.annotations,
        )

    return func.with_body(tvm_ffi.structural_map(func.body, (tirx.For, bound)))
