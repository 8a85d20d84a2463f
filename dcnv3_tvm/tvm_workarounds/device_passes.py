"""Passes for GPU kernels that repeat or complete passes of TVM."""

from __future__ import annotations

from typing import Any

import tvm
import tvm_ffi
from tvm import ir, tirx
from tvm.sym import Analyzer


@tvm.transform.module_pass(opt_level=0, name="dcnv3_tvm.LowerWarpMemory")
def lower_warp_memory(module: tvm.IRModule, _context: Any) -> tvm.IRModule:
    """Lower all buffers of scope ``"warp"``. See tvm_workarounds: lower-warp-memory."""
    for _ in range(max(map(_count_warp_buffers, module.functions.values()), default=0)):
        module = tirx.transform.LowerWarpMemory()(module)
    return module


def _count_warp_buffers(func: tirx.PrimFunc) -> int:
    scopes: list[str] = []
    tvm_ffi.structural_walk(
        func.body, (tirx.AllocBuffer, lambda allocation: scopes.append(allocation.buffer.scope()))
    )
    return scopes.count("warp")


@tirx.transform.prim_func_pass(opt_level=0, name="dcnv3_tvm.AddCopyOffsets")
def add_copy_offsets(func: tirx.PrimFunc, _module: Any, _context: Any) -> tirx.PrimFunc:
    """Pass the source of an asynchronous copy as an address, with an offset of zero.

    Offsets that fit 32 bits stay, because addresses take more registers. See tvm_workarounds:
    copy-offset.
    """
    analyzer = Analyzer()

    def bind(variable: Any, extent: Any) -> None:
        if isinstance(extent, tirx.IntImm):
            analyzer.bind(variable, ir.Range(0, extent.value))

    tvm_ffi.structural_walk(func.body, (tirx.For, lambda loop: bind(loop.loop_var, loop.extent)))
    tvm_ffi.structural_walk(
        func.body,
        (
            tirx.AttrStmt,
            lambda attribute: (
                bind(attribute.node.var, attribute.value)
                if attribute.attr_key == "thread_extent"
                else None
            ),
        ),
    )

    def add(call: ir.Call) -> ir.Expr:
        if not isinstance(call.op, ir.Op) or call.op.name != "tirx.s_tir.cp_async_raw":
            return call
        to, to_offset, source, offset, *rest = call.args
        if analyzer.const_int_bound(offset).max_value < 2**31:
            return call
        dtype = source.ty.element_type.dtype
        address = tirx.tvm_access_ptr(tirx.type_annotation(dtype), source, offset, 1, 1)
        return tirx.call_intrin(
            call.ty, call.op, to, to_offset, address, tirx.IntImm("int64", 0), *rest
        )

    return func.with_body(tvm_ffi.structural_map(func.body, (ir.Call, add)))


@tirx.transform.prim_func_pass(opt_level=0, name="dcnv3_tvm.MergeConditionals")
def merge_conditionals(func: tirx.PrimFunc, _module: Any, _context: Any) -> tirx.PrimFunc:
    """Rewrite ``if c: a`` followed by ``if c: b`` to ``if c: a; b``.

    Only conditions on variables are merged: ``a`` may change what a condition reads from memory.
    See tvm_workarounds: tail-guards.
    """
    return func.with_body(tvm_ffi.structural_map(func.body, (tirx.SeqStmt, _merge)))


def _merge(sequence: tirx.SeqStmt) -> tirx.Stmt:
    merged: list[tirx.Stmt] = []
    for statement in sequence:
        last = merged[-1] if merged else None
        if last is not None and _same_condition(last, statement):
            both = tirx.SeqStmt([*_statements(last.then_case), *_statements(statement.then_case)])
            merged[-1] = tirx.IfThenElse(last.condition, both, None)
        else:
            merged.append(statement)
    if len(merged) == len(sequence):
        return sequence
    return tirx.SeqStmt(merged) if len(merged) > 1 else merged[0]


def _statements(statement: tirx.Stmt) -> list[tirx.Stmt]:
    return list(statement) if isinstance(statement, tirx.SeqStmt) else [statement]


def _same_condition(first: tirx.Stmt, second: tirx.Stmt) -> bool:
    return (
        isinstance(first, tirx.IfThenElse)
        and isinstance(second, tirx.IfThenElse)
        and first.else_case is None
        and second.else_case is None
        and tvm_ffi.structural_equal(first.condition, second.condition)
        and _only_variables(first.condition)
    )


def _only_variables(condition: ir.Expr) -> bool:
    """Return whether a condition neither reads memory nor calls a function."""
    opaque = (ir.TensorLoad, ir.Call)
    return tvm_ffi.structural_walk(condition, (opaque, tvm_ffi.VisitInterrupt)) is None
