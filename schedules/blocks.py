"""Properties of blocks that the rules of CPUs and GPUs need."""

from __future__ import annotations

from tvm import s_tir, tirx
from tvm.s_tir.schedule import LoopRV, SBlockRV


def block_names(sch: s_tir.Schedule) -> set[str]:
    """Return the names of the blocks of a function."""
    return {sch.get(block).name_hint for block in sch.get_child_blocks(sch.get_sblock("root"))}


def reduces(sch: s_tir.Schedule, block: SBlockRV) -> bool:
    """Whether a block has an axis that is not spatial."""
    return any(axis.iter_type != tirx.IterVar.DataPar for axis in sch.get(block).iter_vars)


def plain_axes(sch: s_tir.Schedule, block: SBlockRV) -> tuple[list[LoopRV], list[LoopRV]] | None:
    """Return the (spatial, reduction) loops of a block, or None unless each axis is one loop."""
    loops = sch.get_loops(block)
    realize = sch.get(loops[-1]).body if loops else None
    if not isinstance(realize, s_tir.SBlockRealize):
        return None
    kinds = {}
    for axis, value in zip(realize.block.iter_vars, realize.iter_values, strict=True):
        if not isinstance(value, tirx.Var):
            return None
        kinds[value] = axis.iter_type
    spatial, reduction = [], []
    for loop in loops:
        kind = kinds.get(sch.get(loop).loop_var)
        if kind == tirx.IterVar.DataPar:
            spatial.append(loop)
        elif kind == tirx.IterVar.CommReduce:
            reduction.append(loop)
        else:
            return None
    return (spatial, reduction) if spatial else None
