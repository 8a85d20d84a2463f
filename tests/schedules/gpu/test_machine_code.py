"""Registers, spills and instructions that ptxas reports for GPU schedules of released models.

These are bounds that must not get worse. No GPU is needed.
"""

import dataclasses

import pytest
import tvm

from dcnv3_tvm.compiler.cuda.assembler_report import report
from dcnv3_tvm.op import tensorir
from dcnv3_tvm.runtime.cuda_toolkit import find_nvcc
from dcnv3_tvm.schedules import schedule_module
from dcnv3_tvm.spec import DCNv3Spec
from dcnv3_tvm.targets import gpu_architecture, resolve_target
from helpers.gpu_kernels import depthwise
from helpers.variant_kernels import variant_kernels

pytestmark = pytest.mark.skipif(find_nvcc() is None, reason="nvcc is not installed")


def compiled(func, target):
    module = tvm.IRModule({"main": func.with_attr("global_symbol", "main")})
    scheduled, _ = schedule_module(module, target)
    (kernel,) = report(scheduled["main"], target)
    assert kernel.spill_bytes == kernel.stack_bytes == 0
    assert kernel.shared_bytes <= gpu_architecture(target).block_shared_bytes
    return kernel


@pytest.mark.parametrize(("dtype", "most"), [("float16", 120), ("float32", 95), ("bfloat16", 140)])
@pytest.mark.parametrize("shape", [(64, 56, 56, 128), (64, 7, 7, 1024)], ids=str)
def test_instructions_per_channel(shape, dtype, most):
    """Instructions bound the kernel; counted for a thread and a channel, including softmax."""
    spec = DCNv3Spec.of(shape, group=shape[-1] // 16, dtype=dtype)
    spec = dataclasses.replace(spec, softmax=True)
    kernel = compiled(tensorir.dcnv3_packed(spec, vector_loads=True), resolve_target("cuda-sm90"))
    channels = 16  # of a thread
    assert kernel.instructions / channels <= most
    assert kernel.load_bytes[-1] == 16
    assert kernel.occupancy >= 0.4


@pytest.mark.parametrize("arch", ["sm80", "sm89", "sm120"])
def test_every_architecture(arch):
    target = resolve_target(f"cuda-{arch}")
    kernels = {
        kernel.name: kernel.function
        for kernel in variant_kernels("internimage_t", target, "float16", batch=64, scheduled=False)
    }
    for name in ("matmul_256_1024_gelu", "convolution_64_128"):
        kernel = compiled(kernels[name], target)
        assert kernel.tensor_cores
        assert kernel.asynchronous
        assert kernel.load_bytes == (16,)
    for name in ("mlp_64_256_64_residual", "mlp_128_512_128_residual"):
        kernel = compiled(kernels[name], target)
        assert kernel.tensor_cores
        assert kernel.asynchronous
        # 4 bytes: bias of the hidden features, in pairs. 8 bytes: the residual.
        assert kernel.load_bytes == (4, 8, 16)
    sampling = next(function for name, function in kernels.items() if name.startswith("dcnv3"))
    assert compiled(sampling, target).load_bytes[-1] == 16


def test_depthwise_of_2560_channels_does_not_spill():
    """It spilled with 256 threads for 320 vectors, where few threads have a second vector."""
    kernel = depthwise(
        *(1, 20, 20, 2560),
        kernel_size=(5, 5),
        pad=(2, 2),
        bias=True,
        norm_eps=1e-6,
        activation="gelu",
        x_dtype="float16",
        out_dtype="float16",
    )
    compiled(kernel, resolve_target("cuda-sm90"))


@pytest.mark.parametrize(
    ("variant", "dtype", "batch", "size"),
    [
        ("internimage_s", "bfloat16", 1, None),
        ("internimage_t", "float32", 3, (225, 333)),
    ],
)
@pytest.mark.slow
def test_kernels_of_a_variant(variant, dtype, batch, size):
    """One kernel of each width and kind: nvcc takes a second for each."""
    target = resolve_target("cuda-sm90")
    kernels = variant_kernels(variant, target, dtype, batch=batch, size=size, scheduled=False)
    ours = [kernel for kernel in kernels if kernel.kind]
    chosen = {(kernel.kind, kernel.inputs[0].shape[-1]): kernel for kernel in ours}
    for (kind, _), kernel in chosen.items():
        result = compiled(kernel.function, target)
        matmul = kind in ("gemm", "mlp") and dtype != "float32"
        assert result.tensor_cores == matmul, kernel.name
