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


def compiled(functions, target):
    """Schedule and compile kernels together; return the report of each."""
    module = tvm.IRModule(
        {name: func.with_attr("global_symbol", name) for name, func in functions.items()}
    )
    scheduled, _ = schedule_module(module, target)
    reports = report([scheduled[name] for name in functions], target)
    found = {}
    for name, (*_, kernel) in zip(functions, reports, strict=True):  # the last one of several
        assert kernel.spill_bytes == kernel.stack_bytes == 0, name
        assert kernel.shared_bytes <= gpu_architecture(target).block_shared_bytes, name
        found[name] = kernel
    return found


def test_instructions_per_channel():
    """Instructions bound the kernel; counted for a thread and a channel, including softmax."""
    most = {"float16": 120, "float32": 95, "bfloat16": 140}
    functions = {}
    for dtype in most:
        for shape in ((64, 56, 56, 128), (64, 7, 7, 1024)):
            spec = DCNv3Spec.of(shape, group=shape[-1] // 16, dtype=dtype)
            spec = dataclasses.replace(spec, softmax=True)
            function = tensorir.dcnv3_packed(spec, vector_loads=True)
            functions[f"{dtype}_{shape[-1]}"] = function
    for name, kernel in compiled(functions, resolve_target("cuda-sm90")).items():
        channels = 16  # of a thread
        assert kernel.instructions / channels <= most[name.partition("_")[0]], name
        assert kernel.load_bytes[-1] == 16, name
        assert kernel.occupancy >= 0.4, name


def test_gradients():
    """The gradients of offset and mask take about the instructions of the forward kernel."""
    most = {"float32_64": 1600, "bfloat16_320": 4100}
    functions = {}
    for (shape, group), name in zip(
        [((64, 56, 56, 64), 4), ((8, 56, 56, 320), 10)], most, strict=True
    ):
        spec = DCNv3Spec.of(shape, group=group, softmax=True, dtype=name.partition("_")[0])
        functions[name] = tensorir.dcnv3_grad_offset_mask(spec, vector_loads=True)
    scatter = tensorir.dcnv3_grad_x(spec, vector_loads=True)
    target = resolve_target("cuda-sm90")
    found = compiled({**functions, "x": scatter}, target)
    for name, instructions in most.items():
        assert found[name].instructions <= instructions, name
        assert found[name].load_bytes[-1] == 16, name
    outputs = 8  # of a thread, which shares their points with the threads of the other channels
    assert found["x"].instructions / outputs <= 520
    assert found["x"].load_bytes[-1] == 8
    assert found["x"].occupancy >= 0.45


@pytest.mark.parametrize("arch", ["sm80", "sm120"])
def test_other_architectures(arch):
    """The oldest, and the newest with as little shared memory as sm86 and sm89."""
    target = resolve_target(f"cuda-{arch}")
    kernels = {
        kernel.name: kernel.function
        for kernel in variant_kernels("internimage_t", target, "float16", batch=64, scheduled=False)
    }
    gemms = ("matmul_256_1024_gelu", "convolution_64_128")
    mlps = ("mlp_64_256_64_residual", "mlp_128_512_128_residual")
    sampling = next(name for name in kernels if name.startswith("dcnv3"))
    found = compiled({name: kernels[name] for name in (*gemms, *mlps, sampling)}, target)
    for name in gemms + mlps:
        assert found[name].tensor_cores
        assert found[name].asynchronous
        # 4 bytes: bias of the hidden features, in pairs. 8 bytes: the residual.
        assert found[name].load_bytes == ((16,) if name in gemms else (4, 8, 16))
    assert found[sampling].load_bytes[-1] == 16


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
    compiled({"depthwise": kernel}, resolve_target("cuda-sm90"))


@pytest.mark.parametrize(
    ("variant", "dtype", "batch", "size"),
    [
        ("internimage_s", "bfloat16", 1, None),
        ("internimage_t", "float32", 3, (225, 333)),
    ],
)
@pytest.mark.slow
def test_kernels_of_a_variant(variant, dtype, batch, size):
    """One kernel of each width and kind."""
    target = resolve_target("cuda-sm90")
    kernels = variant_kernels(variant, target, dtype, batch=batch, size=size, scheduled=False)
    ours = [kernel for kernel in kernels if kernel.kind]
    chosen = {(kernel.kind, kernel.inputs[0].shape[-1]): kernel for kernel in ours}
    results = compiled({kernel.name: kernel.function for kernel in chosen.values()}, target)
    for kernel in chosen.values():
        matmul = kernel.kind in ("gemm", "mlp") and dtype != "float32"
        assert results[kernel.name].tensor_cores == matmul, kernel.name
