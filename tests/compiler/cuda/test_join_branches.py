import pytest
import tvm
from tvm import tirx
from tvm.script import tirx as T

from dcnv3_tvm.compiler.cuda.join_branches import join_branches


def joined(func):
    """Return the statements of a function after the pass, loops opened."""
    body = join_branches(tvm.IRModule({"main": func}))["main"].body
    while isinstance(body, tirx.For | tirx.AttrStmt):
        body = body.body
    return list(body) if isinstance(body, tirx.SeqStmt) else [body]


def test_same_condition():
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

    first, between, *others = joined(func)
    assert isinstance(first, tirx.IfThenElse)
    assert [type(part) for part in first.then_case] == [tirx.BufferStore] * 3
    assert isinstance(between, tirx.BufferStore)
    assert [type(other) for other in others] == [tirx.IfThenElse] * 2


def test_one_statement_is_left():
    @T.prim_func(s_tir=True)
    def func(a: T.Buffer((8,), "float32"), n: T.int64):
        for i in range(T.int64(8)):
            if i < n:
                a[i] = T.float32(1)
            if i < n:
                a[i] = a[i] + T.float32(1)

    (only,) = joined(func)
    assert len(list(only.then_case)) == 2


@pytest.mark.parametrize("kind", ["memory", "call", "else"])
def test_what_is_not_joined(kind):
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

    assert len(joined({"memory": memory, "call": call, "else": otherwise}[kind])) == 2
