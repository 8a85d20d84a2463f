"""A pass that joins what depends on one condition.

Where the last block of threads is not full, each statement of a kernel stands under a condition of
its own, the same for all. So nvcc must find out that they are one; where it does not, loads wait
for the branch before them.
"""

from __future__ import annotations

from typing import Any

import tvm_ffi
from tvm import ir, tirx


@tirx.transform.prim_func_pass(opt_level=0, name="dcnv3_tvm.JoinBranches")
def join_branches(func: tirx.PrimFunc, _module: Any, _context: Any) -> tirx.PrimFunc:
    """Turn ``if c: a``, ``if c: b`` that follow each other into ``if c: a; b``.

    Only conditions on variables are joined: what is read of memory, ``a`` may change.
    """
    return func.with_body(tvm_ffi.structural_map(func.body, (tirx.SeqStmt, _join)))


def _join(sequence: tirx.SeqStmt) -> tirx.Stmt:
    joined: list[tirx.Stmt] = []
    for statement in sequence:
        last = joined[-1] if joined else None
        if last is not None and _same_condition(last, statement):
            both = tirx.SeqStmt([*_parts(last.then_case), *_parts(statement.then_case)])
            joined[-1] = tirx.IfThenElse(last.condition, both, None)
        else:
            joined.append(statement)
    if len(joined) == len(sequence):
        return sequence
    return tirx.SeqStmt(joined) if len(joined) > 1 else joined[0]


def _parts(statement: tirx.Stmt) -> list[tirx.Stmt]:
    return list(statement) if isinstance(statement, tirx.SeqStmt) else [statement]


def _same_condition(one: tirx.Stmt, other: tirx.Stmt) -> bool:
    return (
        isinstance(one, tirx.IfThenElse)
        and isinstance(other, tirx.IfThenElse)
        and one.else_case is None
        and other.else_case is None
        and tvm_ffi.structural_equal(one.condition, other.condition)
        and _of_variables(one.condition)
    )


def _of_variables(condition: ir.Expr) -> bool:
    """Say whether a condition reads no memory and calls nothing."""
    opaque = (ir.TensorLoad, ir.Call)
    return tvm_ffi.structural_walk(condition, (opaque, tvm_ffi.VisitInterrupt)) is None
