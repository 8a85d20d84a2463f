"""CUDA source to machine code, and into artifacts: compiled here, for GPUs that are elsewhere."""

import os

import numpy as np
import pytest

import dcnv3_tvm as dt
from dcnv3_tvm import frontend, gpu, schedules
from dcnv3_tvm.compiler import compile as compiler
from dcnv3_tvm.compiler.cuda import cuda_module
from dcnv3_tvm.errors import CompileError, TargetError
from dcnv3_tvm.runtime import toolkit
from helpers.toy import Toy

NVCC = pytest.mark.skipif(toolkit.find_nvcc() is None, reason="needs nvcc")
NVRTC = pytest.mark.skipif(
    toolkit.find_nvrtc() is None or toolkit.find_headers() is None,
    reason="needs NVRTC and CUDA's headers",
)
SOURCE = """
#include <cuda_fp16.h>
extern "C" __global__ void twice(half* x) { x[threadIdx.x] = x[threadIdx.x] + x[threadIdx.x]; }
"""
ELF = b"\x7fELF"


@NVCC
def test_by_nvcc():
    code = cuda_module.machine_code(SOURCE, "sm_90")
    assert code.startswith(ELF)
    assert b"twice" in code


@NVRTC
def test_by_nvrtc(monkeypatch):
    monkeypatch.setattr(toolkit, "find_nvcc", lambda: None)
    code = cuda_module.machine_code(SOURCE, "sm_90")
    assert code.startswith(ELF)
    assert b"twice" in code
    with pytest.raises(CompileError, match=r"NVRTC cannot compile.*error"):
        cuda_module.machine_code("__global__ void f() { nothing(); }", "sm_90")


@NVCC
def test_source_that_nvcc_refuses():
    with pytest.raises(CompileError, match=r'nvcc cannot compile.*"nothing" is undefined'):
        cuda_module.machine_code("__global__ void f() { nothing(); }", "sm_90")
    with pytest.raises(CompileError, match="It must know sm_13"):
        cuda_module.machine_code(SOURCE, "sm_13")


@pytest.mark.parametrize("nvrtc", [None, "libnvrtc.so.13"])
def test_no_compiler_for_cuda(monkeypatch, nvrtc, tmp_path):
    monkeypatch.setattr(toolkit, "find_nvcc", lambda: None)
    monkeypatch.setattr(toolkit, "find_nvrtc", lambda: nvrtc and tmp_path / nvrtc)
    monkeypatch.setattr(toolkit, "find_headers", lambda: None)
    missing = "the headers that NVRTC needs" if nvrtc else "nvcc, or NVRTC"
    with pytest.raises(CompileError, match=rf"{missing}.*pip install 'nvidia-cuda-nvrtc>=13,<14'"):
        cuda_module.machine_code(SOURCE, "sm_90")
    spec = dt.DCNv3Spec.of((1, 4, 3, 16), group=1)
    with pytest.raises(CompileError, match="no compiler for CUDA"):
        dt.compile_op(spec, "cuda-sm90")


@NVCC
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_a_library_holds_machine_code_and_no_source(arch):
    toy = Toy.build(1, arch=arch)
    assert toy.code.count(ELF) == 2  # the library's own, and the kernels'
    assert b"__global__" not in toy.code
    assert all(name in toy.code for name in (b"add_kernel", b"relu_kernel", b"reshape_kernel"))
    assert toy.metadata.target.arch == arch
    assert toy.metadata.activation_bytes == {"main": 2 * 768, "features": 0}


@NVCC
@pytest.mark.parametrize("cuda_graph", [True, False])
def test_graphs_can_be_left_out(cuda_graph):
    code = Toy.build(1, arch="sm_90", cuda_graph=cuda_graph).code
    assert (b"vm.builtin.cuda_graph.run_or_capture" in code) is cuda_graph


@NVCC
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_the_operator_is_compiled_for_a_gpu_that_is_elsewhere(dtype):
    operator = dt.compile_op(dt.DCNv3Spec.of((1, 8, 8, 32), group=2, dtype=dtype), "cuda-sm90")
    assert operator.rule == "dcnv3"
    assert b"dcnv3_kernel" in operator.executable.code
    x = np.zeros((1, 8, 8, 32), np.float16 if dtype == "float16" else np.float32)
    with pytest.raises(ValueError, match="not where the operator computes; got cpu"):
        operator(x, x, x)


def test_the_environment_is_as_it_was(monkeypatch):
    for value in (None, "0"):
        if value is None:
            monkeypatch.delenv("TVM_COMPILE_FORCE_FALLBACK", raising=False)
        else:
            monkeypatch.setenv("TVM_COMPILE_FORCE_FALLBACK", value)
        with cuda_module.lowering():
            assert os.environ["TVM_COMPILE_FORCE_FALLBACK"] == "1"
        assert os.environ.get("TVM_COMPILE_FORCE_FALLBACK") == value


def test_a_broken_nvcc(monkeypatch, tmp_path):
    script = tmp_path / "nvcc"
    script.write_text("#!/bin/sh\necho no host compiler: fatal >&2\nexit 3\n")
    script.chmod(0o755)
    monkeypatch.setattr(toolkit, "find_nvcc", lambda: script)
    with pytest.raises(CompileError, match="got no host compiler: fatal"):
        cuda_module.machine_code(SOURCE, "sm_90")


@pytest.fixture(scope="module")
def imported():
    name = frontend.list_models("test_internimage_*")[0]
    return frontend.import_model(frontend.create_model(name), example=(1, 3, 32, 32))


@pytest.mark.parametrize(
    ("target", "dtype", "words"),
    [
        ("cpu-znver4", "float16", "float32 and bfloat16 on processors; float16 on GPUs"),
        ("cpu-haswell", "bfloat16", "avx512_bf16"),
    ],
)
def test_dtypes_that_a_processor_does_not_have(imported, tmp_path, target, dtype, words):
    with pytest.raises(TargetError, match=words):
        dt.compile_artifact(imported, tmp_path / "x", target=target, dtype=dtype)


@pytest.mark.skipif(bool(gpu.devices()), reason="needs a machine without a GPU")
@pytest.mark.parametrize("dtype", compiler.DTYPES)
def test_a_model_for_a_gpu_that_is_elsewhere_is_refused_at_once(imported, monkeypatch, dtype):
    def fail(*_):
        pytest.fail("it was compiled")

    monkeypatch.setattr(schedules, "schedule_module", fail)
    with pytest.raises(TargetError, match=r"this machine has none.*--target auto"):
        dt.compile_model(imported, target="cuda-sm90", dtype=dtype)
