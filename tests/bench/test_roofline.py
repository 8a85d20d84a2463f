"""Bytes, operations and rooflines of kernels, computed by hand."""

import numpy as np
import pytest

from dcnv3_tvm.bench.gpu_models import GPU_MODELS, gpu_model
from dcnv3_tvm.bench.kernels import kernel_bytes, kernel_flops, kernel_roofline
from dcnv3_tvm.bench.roofline import Peaks, Roofline
from dcnv3_tvm.compiler.kernel_listing import CalledKernel, KernelArgument
from dcnv3_tvm.errors import InvalidArgumentError
from dcnv3_tvm.kernels.epilogue import Epilogue
from dcnv3_tvm.op import tensorir
from dcnv3_tvm.spec import DCNv3Spec
from helpers.gpu_kernels import gemm, implicit_gemm, mlp, pack_gemm_weight

PEAKS = Peaks(flops=1e9, bytes=1e8, how="made up", half_flops=1e10)


def gpu_kernel(function, *shapes, dtypes):
    """Make a kernel whose last shape is the output's."""
    arguments = [KernelArgument(*pair) for pair in zip(shapes, dtypes, strict=True)]
    return CalledKernel("k", "rule", function, tuple(arguments[:-1]), (arguments[-1],), calls=1)


def cpu_kernel(rule, *shapes, function=None, weight="float32"):
    """Make a kernel with float32 activations, whose last shape is the output's."""
    dtypes = ["float32", weight, "float32", "float32"]
    arguments = [KernelArgument(*pair) for pair in zip(shapes, dtypes, strict=False)]
    return CalledKernel("k", rule, function, tuple(arguments[:-1]), (arguments[-1],), calls=1)


def gemm_kernel(rows, inputs, outputs, dtype):
    function = gemm((rows,), inputs, outputs, epilogue=Epilogue(bias=True), dtype=dtype)
    weight = pack_gemm_weight(np.zeros((outputs, inputs), dtype)).shape
    return gpu_kernel(
        function,
        *((rows, inputs), weight, (outputs,), (rows, outputs)),
        dtypes=(dtype, dtype, "float32", dtype),
    )


def test_gpu_models():
    peaks = gpu_model("h200").peaks
    rates = {dtype: peaks.flops_in(dtype) for dtype in ("float32", "float16", "bfloat16")}
    assert rates == {"float32": 67e12, "float16": 790e12, "bfloat16": 790e12}
    for model in GPU_MODELS.values():
        assert model.peaks.flops < model.peaks.half_flops
    with pytest.raises(InvalidArgumentError, match="allowed: h200, h100, a100"):
        gpu_model("h300")


def test_flops_of_cpu_kernels():
    matmul = cpu_kernel("matmul", (2, 5, 8), (2, 8, 16), (20,), (2, 5, 20))
    assert kernel_flops(matmul) == 2 * 10 * 8 * 20
    convolution = cpu_kernel("convolution", (1, 9, 9, 4), (1, 3, 5, 4, 16), (1, 5, 4, 10))
    assert kernel_flops(convolution) == 2 * 20 * 10 * 3 * 5 * 4
    depthwise = cpu_kernel("depthwise", (1, 6, 7, 8), (3, 3, 8), (1, 6, 7, 8))
    assert kernel_flops(depthwise) == 2 * 6 * 7 * 8 * 9
    assert kernel_flops(cpu_kernel("layer_norm", (4, 8), (8,), (4, 8))) == 0


@pytest.mark.parametrize("inputs", [24, 40, 64])
def test_flops_of_an_mlp_are_those_of_both_matmuls(inputs):
    function = mlp((10,), inputs, 96, 20, activation="gelu", residual=False, dtype="float16")
    shapes = [[int(size) for size in param.shape] for param in function.params]
    kernel = gpu_kernel(function, *shapes, dtypes=[str(param.dtype) for param in function.params])
    assert kernel_flops(kernel) == 2 * 10 * 96 * (inputs + 20)


DTYPES = pytest.mark.parametrize("dtype", ["float16", "float32"])


@DTYPES
@pytest.mark.parametrize("inputs", [3, 16, 40, 112, 144, 168])
def test_padding_of_a_gemm_does_not_count(inputs, dtype):
    assert kernel_flops(gemm_kernel(10, inputs, 20, dtype)) == 2 * 10 * inputs * 20


@DTYPES
@pytest.mark.parametrize("channels", [3, 8, 16, 32, 56, 80])
def test_padding_of_a_convolution_does_not_count(channels, dtype):
    function = implicit_gemm(
        2, 9, 9, channels, 24, kernel_size=(3, 3), stride=(2, 2), pad=(1, 1), dtype=dtype
    )
    weight = pack_gemm_weight(np.zeros((24, 3, 3, channels), dtype)).shape
    kernel = gpu_kernel(function, (2, 9, 9, channels), weight, (2, 5, 5, 24), dtypes=(dtype,) * 3)
    assert kernel_flops(kernel) == 2 * 2 * 25 * 24 * 9 * channels


def test_roofline_of_gemms():
    flops, elements = 2 * 10 * 16 * 32, 10 * 16 + 32 * 16 + 10 * 32
    single, half = (gemm_kernel(10, 16, 32, dtype) for dtype in ("float32", "float16"))
    assert kernel_bytes(single) == 4 * elements + 4 * 32
    assert kernel_bytes(half) == 2 * elements + 4 * 32
    bounds = kernel_roofline(single, PEAKS)
    assert bounds.memory == pytest.approx((4 * elements + 128) / 1e8)
    assert bounds.arithmetic == pytest.approx(flops / 1e9)
    assert bounds.seconds == bounds.memory > bounds.arithmetic
    assert kernel_roofline(half, PEAKS).arithmetic == pytest.approx(flops / 1e10)


def test_large_gemm_is_bound_by_arithmetic():
    bounds = kernel_roofline(gemm_kernel(4096, 4096, 4096, "float16"), gpu_model("h200").peaks)
    assert bounds.seconds == bounds.arithmetic == pytest.approx(2 * 4096**3 / 790e12)
    assert bounds.memory == pytest.approx((3 * 2 * 4096**2 + 4 * 4096) / 4.3e12)


def test_cpu_rate_of_bfloat16_matmuls_is_doubled():
    matmul = cpu_kernel("matmul", (2, 5, 8), (2, 4, 16, 2), (20,), (2, 5, 20), weight="bfloat16")
    peaks = Peaks(flops=1e9, bytes=1e8, how="made up")
    assert kernel_roofline(matmul, peaks).arithmetic == pytest.approx(3200 / 2e9)
    assert kernel_bytes(matmul) == 4 * (80 + 20 + 200) + 2 * 256
    assert Roofline.of(1e8, 2e7, peaks, "bfloat16") == Roofline(memory=0.2, arithmetic=0.05)


def test_rate_of_matrix_tiles():
    peaks = Peaks(flops=1e9, bytes=1e8, how="made up", half_flops=2e10)
    matmul = cpu_kernel(
        "tile_matmul", (2, 5, 40), (2, 2, 2, 16, 16, 2), (2, 5, 64), weight="bfloat16"
    )
    assert kernel_roofline(matmul, peaks).arithmetic == pytest.approx(2 * 10 * 40 * 64 / 2e10)
    image = cpu_kernel(
        "tile_convolution",
        (1, 8, 8, 16),
        (1, 3, 2, 2, 16, 16, 2),
        (1, 4, 4, 32),
        weight="bfloat16",
    )
    assert kernel_flops(image) == 2 * 4 * 4 * 32 * 9 * 16


def test_float16_sampling_computes_in_float32():
    spec = DCNv3Spec.of((64, 56, 56, 128), group=8, dtype="float16", softmax=True)
    shapes = (spec.input_shape, spec.offset_shape, spec.mask_shape, spec.output_shape)
    kernel = gpu_kernel(tensorir.dcnv3(spec), *shapes, dtypes=("float16",) * 4)
    assert (kernel_flops(kernel), kernel_bytes(kernel)) == (spec.flops, spec.bytes)
    bounds = kernel_roofline(kernel, gpu_model("h200").peaks)
    pixels = 64 * 56 * 56
    assert bounds.memory == pytest.approx(2 * pixels * (2 * 128 + 3 * 72) / 4.3e12)
    assert bounds.arithmetic == pytest.approx(72 * pixels * 128 / 67e12)


def test_flops_of_the_sampling_are_those_of_the_operator():
    spec = DCNv3Spec.of((1, 9, 5, 8), group=2, kernel_size=(3, 5), pad=(1, 2), remove_center=True)
    shapes = (spec.input_shape, spec.offset_shape, spec.mask_shape, spec.output_shape)
    sampling = cpu_kernel("dcnv3", *shapes, function=tensorir.dcnv3(spec))
    assert kernel_flops(sampling) == spec.flops > 0
