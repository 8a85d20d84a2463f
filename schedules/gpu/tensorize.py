"""Mark blocks for tensor intrinsics, and replace them as the last step of a schedule.

Until then the marked blocks are plain loops, so that a schedule can be simulated on a CPU.
"""

from __future__ import annotations

from typing import Final

from tvm import s_tir, tirx
from tvm.s_tir.schedule import SBlockRV

_MARK: Final = "meta_schedule.auto_tensorize"
"""TVM's own annotation, so that MetaSchedule replaces the same blocks."""

_ALIGNMENT: Final = "buffer_dim_align"


def annotate(sch: s_tir.Schedule, block: SBlockRV, intrinsic: str) -> None:
    """Mark a block to be replaced by a registered intrinsic."""
    sch.annotate(block, _MARK, intrinsic)


def tensorize(func: tirx.PrimFunc) -> tirx.PrimFunc:
    """Replace the marked blocks of a scheduled function by their intrinsics."""
    sch = s_tir.Schedule(func)
    _tensorize(sch, sch.get_sblock("root"))
    return sch.mod["main"]


def _tensorize(sch: s_tir.Schedule, parent: SBlockRV) -> None:
    for block in sch.get_child_blocks(parent):
        intrinsic = sch.get(block).annotations.get(_MARK)
        if intrinsic is None:
            _tensorize(sch, block)
        else:
            alignment = sch.get(block).annotations.get(_ALIGNMENT)
            sch.unannotate(block, _MARK)
            sch.tensorize(block, str(intrinsic))
            # `tensorize` drops the annotations of the block.
            for buffer, axis, factor, offset in alignment or ():
                sch.storage_align(block, int(buffer), int(axis), int(factor), int(offset))
