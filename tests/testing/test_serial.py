import numpy as np
import pytest
from tvm import s_tir

from dcnv3_tvm.op import gemm
from dcnv3_tvm.testing import layers
from dcnv3_tvm.testing.serial import serialized


def _scheduled(*, shared):
    """A copy for all threads of a block, made inside a loop of these threads."""
    sch = s_tir.Schedule(gemm.linear((32,), 16, 16, dtype="float32"))
    operand, product = sch.get_sblock("operand"), sch.get_sblock("product")
    row, column, depth = sch.get_loops(product)
    block, thread = sch.split(row, [None, 8])
    sch.reorder(block, thread, depth, column)
    sch.bind(block, "blockIdx.x")
    sch.bind(thread, "threadIdx.x")
    if shared:
        sch.set_scope(operand, 0, "shared")
    sch.compute_at(operand, thread)
    sch.bind(sch.get_loops(operand)[-1 if not shared else -2], "threadIdx.x")
    for name in ("epilogue", "store"):
        outer, inner = sch.split(sch.get_loops(sch.get_sblock(name))[0], [None, 8])
        sch.bind(outer, "blockIdx.x")
        sch.bind(inner, "threadIdx.x")
    return sch.mod["main"]


def test_threads_run_one_after_the_other(rng):
    x, weight = (rng.standard_normal(shape).astype("float32") for shape in ((32, 16), (16, 16)))
    serial = serialized(_scheduled(shared=True))
    assert "thread_binding" not in serial.script()
    result = layers.run_kernel(
        serial, [x, gemm.pack(weight)], (32, 16), scheduled=False, dtype="float32"
    )
    np.testing.assert_allclose(result, x @ weight.T, rtol=1e-4, atol=1e-5)


def test_a_share_of_a_share_is_refused():
    """The copy is of one thread's row, and each thread would do its own share of it alone."""
    with pytest.raises(ValueError, match=r"bound to threadIdx\.x"):
        serialized(_scheduled(shared=False))
