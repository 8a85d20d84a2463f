import pytest
import tvm
from tvm import tirx
from tvm.script import tirx as T

from dcnv3_tvm.tvm_workarounds.device_passes import merge_conditionals


def merged_statements(func):
    """Return the statements in the loop of a function after the pass."""
    body = merge_conditionals(tvm.IRModule({"main": func}))["main"].body
    while isinstance(body, tirx.For | tirx.AttrStmt):
        body = body.body
    return list(body) if isinstance(body, tirx.SeqStmt) else [body]


def test_adjacent_statements_with_equal_conditions_are_merged():
    @T.prim_func(s_tir=True)
    def func(a: T.Buffer((8,), "float32"), b: T.Buffer((8,), "float32"), n: T.int64):
        for i in range(T.int64(8)):
            if i < n:
                a[i] = T.float32(1)
            if i < n:
                b[i] = a[i]
                a[i] = T.float32(2)
            b[i] = b[i] + T.float32(1)
            if i < n:
                a[i] = T.float32(3)
            if i < n + T.int64(1):
                a[i] = T.float32(4)

    first, between, *others = merged_statements(func)
    assert isinstance(first, tirx.IfThenElse)
    assert [type(part) for part in first.then_case] == [tirx.BufferStore] * 3
    assert isinstance(between, tirx.BufferStore)
    assert [type(other) for other in others] == [tirx.IfThenElse] * 2


def test_sequence_merged_to_one_statement():
    @T.prim_func(s_tir=True)
    def func(a: T.Buffer((8,), "float32"), n: T.int64):
        for i in range(T.int64(8)):
            if i < n:
                a[i] = T.float32(1)
            if i < n:
                a[i] = a[i] + T.float32(1)

    (only,) = merged_statements(func)
    assert len(list(only.then_case)) == 2


@pytest.mark.parametrize("kind", ["memory", "call", "else"])
def test_not_merged(kind):
    @T.prim_func(s_tir=True)
    def memory(a: T.Buffer((8,), "float32")):
        for i in range(T.int64(8)):
            if a[i] < T.float32(0):
                a[i] = T.float32(1)
            if a[i] < T.float32(0):
                a[i] = T.float32(2)

    @T.prim_func(s_tir=True)
    def call(a: T.Buffer((8,), "float32")):
        for i in range(T.int64(8)):
            if T.call_extern("int32", "random", i) < 1:
                a[i] = T.float32(1)
            if T.call_extern("int32", "random", i) < 1:
                a[i] = T.float32(2)

    @T.prim_func(s_tir=True)
    def otherwise(a: T.Buffer((8,), "float32"), n: T.int64):
        for i in range(T.int64(8)):
            if i < n:
                a[i] = T.float32(1)
            else:
                a[i] = T.float32(2)
            if i < n:
                a[i] = T.float32(3)

    assert len(merged_statements({"memory": memory, "call": call, "else": otherwise}[kind])) == 2
