"""The last step of a schedule: intrinsics take the place of the blocks that are marked for them.

Until then the marked blocks are plain loops, so that a schedule can be run on any processor.
"""

from __future__ import annotations

from typing import Final

from tvm import s_tir, tirx
from tvm.s_tir.schedule import SBlockRV

_MARK: Final = "meta_schedule.auto_tensorize"
"""TVM's own name for it, so that its tuner does the same."""

_ALIGNMENT: Final = "buffer_dim_align"


def annotate(sch: s_tir.Schedule, block: SBlockRV, intrinsic: str) -> None:
    """Mark a block to be replaced by a registered intrinsic."""
    sch.annotate(block, _MARK, intrinsic)


def tensorize(func: tirx.PrimFunc) -> tirx.PrimFunc:
    """Put intrinsics in the place of the marked blocks of a scheduled function."""
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
            # The new block has no annotations.
            for buffer, axis, factor, offset in alignment or ():
                sch.storage_align(block, int(buffer), int(axis), int(factor), int(offset))
