"""Loops, buffers and calls of a scheduled function."""

import tvm_ffi
from tvm import ir, s_tir, tirx


def nodes(root, kind):
    """List the nodes of a type in a statement or expression."""
    found = []
    tvm_ffi.structural_walk(root, (kind, found.append), order="pre")
    return found


def loop_kinds(func):
    """Return the kinds of a function's loops, such as ``"PARALLEL"``."""
    return {tirx.ForKind(loop.kind).name for loop in nodes(func.body, tirx.For)}


def buffer_scopes(func):
    """Return the memory scopes of a function's intermediate buffers."""
    blocks = nodes(func.body, s_tir.SBlock)
    return {buffer.scope() for block in blocks for buffer in block.alloc_buffers}


def block_names(func):
    """List the names of a function's blocks in the order of execution."""
    return [block.name_hint for block in nodes(func.body, s_tir.SBlock)]


def block_body(func, name):
    """Return the body of the only block of a name."""
    (block,) = (block for block in nodes(func.body, s_tir.SBlock) if block.name_hint == name)
    return block.body


def called(root):
    """Return the operators that a statement calls, and the names of its external functions."""
    calls = nodes(root, ir.Call)
    externs = {arg.value for call in calls for arg in call.args if isinstance(arg, ir.StringImm)}
    return {call.op.name for call in calls} | externs
