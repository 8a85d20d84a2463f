"""GPU libraries exported on a machine without a GPU."""

import numpy as np
import pytest

import dcnv3_tvm as dt
from dcnv3_tvm.runtime import cuda_toolkit
from helpers.toy import Toy

pytestmark = pytest.mark.skipif(cuda_toolkit.find_nvcc() is None, reason="nvcc is not installed")


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_library_holds_cubins_and_no_source(arch):
    toy = Toy.build(1, arch=arch)
    assert toy.code.count(b"\x7fELF") == 2  # the library and the cubin in it
    assert b"__global__" not in toy.code
    assert all(name in toy.code for name in (b"add_kernel", b"relu_kernel", b"reshape_kernel"))
    assert b"vm.builtin.cuda_graph.run_or_capture" in toy.code
    assert toy.metadata.target.arch == arch
    assert toy.metadata.activation_bytes == {"main": 2 * 768, "features": 0}


def test_cuda_graph_can_be_disabled():
    code = Toy.build(1, arch="sm_90", cuda_graph=False).code
    assert b"vm.builtin.cuda_graph.run_or_capture" not in code


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_operator(dtype):
    operator = dt.compile_op(dt.DCNv3Spec.of((1, 8, 8, 32), group=2, dtype=dtype), "cuda-sm90")
    assert operator.kernel.rule == "dcnv3"
    assert b"dcnv3_kernel" in operator.kernel.library.code
    x = np.zeros((1, 8, 8, 32), np.float16 if dtype == "float16" else np.float32)
    with pytest.raises(ValueError, match="not on the operator's device; got cpu"):
        operator(x, x, x)
