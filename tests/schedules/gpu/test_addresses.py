"""Addresses of dynamic sizes are computed in 64 bits: checked in the PTX. No GPU is needed."""

import pytest
import tvm

from dcnv3_tvm import frontend
from dcnv3_tvm.compiler.cuda import device_pipeline
from dcnv3_tvm.compiler.pipeline import run_pipeline
from dcnv3_tvm.runtime.cuda_toolkit import find_nvcc
from dcnv3_tvm.schedules import schedule_module
from dcnv3_tvm.targets import resolve_target
from dcnv3_tvm.verify.placeholder_weights import placeholder_model
from helpers.gpu_kernels import gemm as gemm_kernel
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
    kernel = gemm_kernel((tvm.tirx.Var("n", "int64"), 6), 64, 48, dtype="float16")
    scheduled, _ = schedule_module(tvm.IRModule({"main": kernel}), TARGET)
    (found,) = compiled({"main": scheduled["main"]}).values()
    assert len(found.addresses) > 20
    assert bool(found.overflows()) == fault


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_kernels_of_dynamic_batch_and_size(dtype):
    model = placeholder_model("internimage_t", shorten=True)
    imported = frontend.import_model(
        model, example=(1, 3, 64, 64), features="never", dynamic_batch=True, dynamic_size=True
    )
    program, kernels = run_pipeline(imported, TARGET, dtype=dtype, until="schedule")
    found = compiled({name: program.module[name] for name in kernels})
    assert len(found) > 10
    assert not {name: each.overflows() for name, each in found.items() if each.overflows()}
