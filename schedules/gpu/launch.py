"""Launch configuration of scheduled kernels: thread extents, limits, `__launch_bounds__`."""

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
"""TVM's attribute for the second argument of ``__launch_bounds__``."""

_UNBOUNDED: Final = 0

_CANDIDATES: Final = (_UNBOUNDED, 1, 2, 3, 4, 6, 8, 12, 16)


def launches(func: tirx.PrimFunc) -> list[dict[str, str]]:
    """Return the extents by thread axis of each GPU kernel of a scheduled function."""
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
    """Return the threads of a block, given an item of `launches`."""
    return math.prod(
        int(extent)
        for axis, extent in extents.items()
        if axis.startswith("threadIdx") and extent.isdecimal()
    )


def check_launch(func: tirx.PrimFunc) -> None:
    """Check the number of threads of a block.

    Raises
    ------
    DecisionError
        If a block has more threads than a GPU allows.
    """
    for extents in launches(func):
        threads = block_threads(extents)
        if threads > MAX_BLOCK_THREADS:
            raise DecisionError(
                "a block has too many threads", got=threads, allowed=f"up to {MAX_BLOCK_THREADS}"
            )


def set_min_blocks(
    func: tirx.PrimFunc, target: Target, space: SearchSpace, default: int = _UNBOUNDED
) -> tirx.PrimFunc:
    """Choose ``__launch_bounds__`` min-blocks, which limits the registers of a thread.

    More resident blocks hide more latency, but spill registers.

    Parameters
    ----------
    func : tvm.tirx.PrimFunc
        Scheduled function; of several GPU kernels, this is about the last one.
    target : tvm.target.Target
        GPU target.
    space : SearchSpace
        Decides ``min_blocks``.
    default : int
        Default of ``min_blocks``; 0 leaves the number of registers to ptxas.
    """
    wanted = space.pick("min_blocks", _CANDIDATES, default)
    if wanted == _UNBOUNDED:
        return func
    kernels = launches(func)
    threads, architecture = block_threads(kernels[-1]), gpu_architecture(target)
    # Never 0, even for a block with too many threads, which `check_launch` rejects.
    blocks = max(1, min(wanted, architecture.blocks, architecture.threads // threads))

    def bound(loop: tirx.For) -> tirx.For:
        if loop.thread_binding is None or loop.thread_binding.thread_tag != "blockIdx.x":
            return loop
        # Inside the first thread loop, because TVM leaves what encloses it on the host.
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
