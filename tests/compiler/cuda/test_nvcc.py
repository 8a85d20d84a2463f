"""CUDA source to cubins, by nvcc and NVRTC; no GPU is needed."""

import re

import pytest

import dcnv3_tvm as dt
from dcnv3_tvm.compiler.cuda.nvcc import compile_cubin
from dcnv3_tvm.errors import CompileError
from dcnv3_tvm.runtime import cuda_toolkit
from helpers.ptx import compile_ptx

NVCC = pytest.mark.skipif(cuda_toolkit.find_nvcc() is None, reason="nvcc is not installed")
NVRTC = pytest.mark.skipif(
    cuda_toolkit.find_nvrtc() is None or cuda_toolkit.find_headers() is None,
    reason="NVRTC or CUDA's headers are not installed",
)
SOURCE = """
#include <cuda_fp16.h>
extern "C" __global__ void twice(half* x) { x[threadIdx.x] = x[threadIdx.x] + x[threadIdx.x]; }
"""
FUNCTIONS = (
    *("tanhf(x[9])", "powf(x[10], 2.0f)", "sinf(x[11])", "cosf(x[12])", "expf(x[13])"),
    *("x[14] / x[15]", "logf(x[16])", "erff(x[17])"),
)
INVALID = "__global__ void f() { nothing(); }"


def assert_is_cubin(code):
    assert code.startswith(b"\x7fELF")
    assert b"twice" in code


@NVCC
def test_nvcc():
    assert_is_cubin(compile_cubin(SOURCE, "sm_90"))


@NVCC
def test_functions_of_users_are_accurate():
    """Of approximate instructions, only those without exceptions are used: powf of fast math is
    NaN for negative bases, and its tanhf and sinf have errors of 1e-4 and more."""
    lines = "".join(f"x[{i}] = {each};\n" for i, each in enumerate(FUNCTIONS))
    kernels = compile_ptx(f'extern "C" __global__ void f(float* x) {{\n{lines}}}')
    found = set(re.findall(r"\w+\.(?:approx|full)[.\w]*", kernels["f"].text))
    exact = {f"{name}.approx.ftz.f32" for name in ("ex2", "rcp", "rsqrt", "sqrt")}
    assert found <= exact | {"div.full.ftz.f32"}
    assert "div.full.ftz.f32" in found


@NVRTC
def test_nvrtc(monkeypatch):
    monkeypatch.setattr(cuda_toolkit, "find_nvcc", lambda: None)
    assert_is_cubin(compile_cubin(SOURCE, "sm_90"))
    with pytest.raises(CompileError, match=r"NVRTC cannot compile.*error"):
        compile_cubin(INVALID, "sm_90")


@NVCC
def test_nvcc_errors():
    with pytest.raises(CompileError, match=r'nvcc cannot compile.*"nothing" is undefined'):
        compile_cubin(INVALID, "sm_90")
    with pytest.raises(CompileError, match="It must support sm_13"):
        compile_cubin(SOURCE, "sm_13")


def test_broken_nvcc(monkeypatch, tmp_path):
    script = tmp_path / "nvcc"
    script.write_text("#!/bin/sh\necho no host compiler: fatal >&2\nexit 3\n")
    script.chmod(0o755)
    monkeypatch.setattr(cuda_toolkit, "find_nvcc", lambda: script)
    with pytest.raises(CompileError, match="got no host compiler: fatal"):
        compile_cubin(SOURCE, "sm_90")


@pytest.mark.parametrize("nvrtc", [None, "libnvrtc.so.13"])
def test_missing_compiler(monkeypatch, nvrtc, tmp_path):
    monkeypatch.setattr(cuda_toolkit, "find_nvcc", lambda: None)
    monkeypatch.setattr(cuda_toolkit, "find_nvrtc", lambda: nvrtc and tmp_path / nvrtc)
    monkeypatch.setattr(cuda_toolkit, "find_headers", lambda: None)
    missing = "the headers that NVRTC needs" if nvrtc else "nvcc, or NVRTC"
    with pytest.raises(CompileError, match=rf"{missing}.*pip install 'nvidia-cuda-nvrtc>=13,<14'"):
        compile_cubin(SOURCE, "sm_90")
    spec = dt.DCNv3Spec.of((1, 4, 3, 16), group=1)
    with pytest.raises(CompileError, match="no CUDA compiler"):
        dt.compile_op(spec, "cuda-sm90")
