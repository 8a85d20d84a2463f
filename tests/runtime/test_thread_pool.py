"""The thread pool that is linked to compiled libraries on Linux."""

import concurrent.futures
import contextlib
import os
import resource
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import tvm
from tvm.script import tirx as T

from dcnv3_tvm import compile_op
from dcnv3_tvm.compiler.linker import find_linker
from dcnv3_tvm.machine import usable_cores
from dcnv3_tvm.runtime import kernel, library, thread_pool
from dcnv3_tvm.runtime.calls import call_here
from dcnv3_tvm.spec import DCNv3Spec
from dcnv3_tvm.systems import this_system
from helpers.forks import in_child

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="other systems use TVM's pool"),
    # Python warns of what this library makes safe.
    pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning"),
]


@pytest.fixture
def operator(monkeypatch):
    """Return whether a call of an operator, on five threads, has the right result."""
    spec = DCNv3Spec.of((1, 9, 5, 16), group=2)
    rng = np.random.default_rng(0)
    tensors = [
        rng.standard_normal(shape).astype(np.float32)
        for shape in (spec.input_shape, spec.offset_shape, spec.mask_shape)
    ]
    compiled = compile_op(spec)
    assert compiled.kernel.library.pooled
    monkeypatch.setattr(kernel, "_threads", lambda: 1)
    expected = compiled(*tensors)
    monkeypatch.setattr(kernel, "_threads", lambda: 5)
    return lambda: np.array_equal(compiled(*tensors), expected)


def test_many_callers_start_no_more_threads_than_cores(operator):
    def call_often():
        return all(operator() for _ in range(100))

    def work():
        with concurrent.futures.ThreadPoolExecutor(8) as callers:
            futures = [callers.submit(call_often) for _ in range(8)]
            right = all(future.result() for future in futures)
            return right and _threads() <= 1 + 8 + len(usable_cores())

    assert in_child(work)


def test_system_that_starts_no_more_threads(operator):
    def without_memory_for_stacks():
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + (1 << 20)
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        with contextlib.suppress(RuntimeError):
            while True:  # Stacks of threads that have ended are used again.
                threading.Thread(target=threading.Event().wait, daemon=True).start()
        before = _threads()
        return operator() and _threads() == before

    assert in_child(without_memory_for_stacks)


def test_error_in_a_task(tmp_path):
    @T.prim_func
    def copy_positive(x: T.Buffer((64,), "float32"), y: T.Buffer((64,), "float32")):
        T.func_attr({"global_symbol": "copy_positive"})
        for i in T.parallel(64):
            assert x[i] > T.float32(0), "not positive"
            y[i] = x[i]

    path = tmp_path / "library.so"
    executable = tvm.compile(tvm.IRModule({"copy_positive": copy_positive}), "llvm")
    executable.mod.export_library(str(path), fcompile=find_linker(this_system()))
    module = library.open_library(path.read_bytes())
    assert thread_pool.join(module)
    x, y = np.ones(64, np.float32), np.zeros(64, np.float32)
    for wrong in (0, 40, 63):
        x[wrong] = 0
        with pytest.raises(RuntimeError, match="not positive"):
            call_here(module["copy_positive"], (x, y), 4, pooled=True)
        x[wrong] = 1
    call_here(module["copy_positive"], (x, y), 4, pooled=True)
    np.testing.assert_array_equal(y, x)


def _threads():
    return len(os.listdir("/proc/self/task"))
