"""Addresses of dynamic sizes are computed in 64 bits: checked in the PTX. No GPU is needed."""

import pytest
import tvm

from dcnv3_tvm.compiler.cuda import device_pipeline
from dcnv3_tvm.runtime.cuda_toolkit import find_nvcc
from dcnv3_tvm.schedules import schedule_module
from dcnv3_tvm.targets import resolve_target
from helpers.gpu_kernels import gemm, implicit_gemm, mlp
from helpers.ptx import compile_ptx

pytestmark = pytest.mark.skipif(find_nvcc() is None, reason="nvcc is not installed")

TARGET = resolve_target("cuda-sm90")


@tvm.transform.module_pass(opt_level=0, name="Nothing")
def nothing(module, _context):
    return module


def compiled(functions):
    module = tvm.IRModule(
        {name: func.with_attr("global_symbol", name) for name, func in functions.items()}
    )
    with device_pipeline.lowering():
        built = tvm.compile(module, target=TARGET, tir_pipeline=device_pipeline.PIPELINE)
    return compile_ptx("\n".join(device_pipeline.cuda_sources(built.mod)))


@pytest.mark.parametrize("fault", [False, True])
def test_copies_of_dynamic_rows(monkeypatch, fault):
    """Without the workaround, the offset of a copy is an int."""
    if fault:
        monkeypatch.setattr(device_pipeline, "add_copy_offsets", nothing)
    kernel = gemm((tvm.tirx.Var("n", "int64"), 6), 64, 48, dtype="float16")
    scheduled, _ = schedule_module(tvm.IRModule({"main": kernel}), TARGET)
    (found,) = compiled({"main": scheduled["main"]}).values()
    assert len(found.addresses) > 20
    assert bool(found.overflows()) == fault


def test_convolution_and_mlp_of_dynamic_sizes():
    n, h, w = (tvm.tirx.Var(name, "int64") for name in "nhw")
    window = {"kernel_size": (3, 3), "stride": (2, 2), "pad": (1, 1)}
    ends = {"activation": "gelu", "residual": True}
    kernels = {
        "convolution": implicit_gemm(n, h, w, 16, 32, dtype="float16", **window),
        "mlp": mlp((n, 6), 64, 256, 64, dtype="float16", **ends),
    }
    scheduled, _ = schedule_module(tvm.IRModule(kernels), TARGET)
    found = compiled({name: scheduled[name] for name in kernels})
    assert {name.removesuffix("_kernel"): each.overflows() for name, each in found.items()} == {
        name: [] for name in kernels
    }
