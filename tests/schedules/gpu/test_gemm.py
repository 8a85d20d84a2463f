import re

import numpy as np
import pytest
import tvm

from dcnv3_tvm.kernels.epilogue import Epilogue
from dcnv3_tvm.kernels.layer_norm import layer_norm
from dcnv3_tvm.schedules.gpu.gemm import gemm
from dcnv3_tvm.schedules.gpu.gemm_tensor_core import default_tile
from dcnv3_tvm.schedules.gpu.tensorize import tensorize
from dcnv3_tvm.schedules.rule import Refusal
from dcnv3_tvm.schedules.space import SearchSpace
from dcnv3_tvm.targets import resolve_target
from helpers import layers
from helpers.arrays import random_array
from helpers.gpu_kernels import gemm as gemm_kernel
from helpers.gpu_kernels import implicit_gemm, pack_gemm_weight

TARGET = resolve_target("cuda-sm90")
DTYPES = ("float32", "float16", "bfloat16")
GELU = Epilogue(bias=True, activation="gelu")
RESIDUAL = Epilogue(bias=True, residual=True)


def run(gpu, kernel, inputs, shape, dtype):
    scheduled = tensorize(gemm(kernel, TARGET, SearchSpace()))
    (result,) = gpu.run(scheduled, TARGET, inputs, [(shape, dtype)])
    return result


MATMUL = [
    ((128,), 64, 64, Epilogue()),
    ((3, 7, 9), 80, 112, GELU),
    ((2, 5, 31), 160, 48, RESIDUAL),
    ((1, 1), 96, 1000, Epilogue(bias=True)),
    ((5,), 64, 112, RESIDUAL),
    ((300,), 112, 448, GELU),
    ((17,), 27, 10, RESIDUAL),
]


@pytest.mark.parametrize("dtype", DTYPES)
def test_matmul(check_together, dtype, rng):
    problems = {}
    for lead, inputs, outputs, epilogue in MATMUL:
        x = random_array(rng, *lead, inputs, dtype=dtype)
        weight = random_array(rng, outputs, inputs, dtype=dtype)
        bias = random_array(rng, outputs)
        residual = random_array(rng, *lead, outputs, dtype=dtype)
        kernel = gemm_kernel(lead, inputs, outputs, epilogue=epilogue, dtype=dtype)
        arrays = [x, pack_gemm_weight(weight)]
        arrays += [bias] if epilogue.bias else []
        arrays += [residual] if epilogue.residual else []
        name = "_".join(map(str, ("matmul", *lead, inputs, outputs)))
        matmul = x.astype(np.float64) @ weight.astype(np.float64).T
        expected = layers.finish(epilogue, matmul, bias, residual)
        scheduled = tensorize(gemm(kernel, TARGET, SearchSpace()))
        problems[name] = (scheduled, arrays, (expected.shape, dtype), expected)
    check_together(TARGET, problems)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_float32_input_residual_and_output(gpu, assert_close, dtype, rng):
    x = random_array(rng, 50, 64)
    weight = random_array(rng, 96, 64, dtype=dtype)
    bias, residual = random_array(rng, 96), random_array(rng, 50, 96)
    kernel = gemm_kernel(
        (50,),
        64,
        96,
        epilogue=RESIDUAL,
        dtype=dtype,
        x_dtype="float32",
        residual_dtype="float32",
        out_dtype="float32",
    )
    result = run(gpu, kernel, [x, pack_gemm_weight(weight), bias, residual], (50, 96), "float32")
    matmul = x.astype(dtype).astype(np.float64) @ weight.astype(np.float64).T
    assert_close(result, matmul + bias + residual, "float32")


CONVOLUTION = [
    ((2, 9, 11, 40), 80, (3, 3), (2, 2), (1, 1)),
    ((1, 12, 7, 3), 32, (3, 3), (2, 2), (1, 1)),
    ((1, 8, 6, 16), 24, (5, 3), (1, 2), (0, 1)),
    ((2, 6, 5, 64), 128, (3, 3), (1, 1), (1, 1)),
]


@pytest.mark.parametrize("dtype", DTYPES)
def test_convolution(check_together, dtype, rng):
    problems = {}
    for image, outputs, kernel_size, stride, pad in CONVOLUTION:
        x = random_array(rng, *image, dtype=dtype)
        weight = random_array(rng, outputs, image[-1], *kernel_size, dtype=dtype)
        bias = random_array(rng, outputs)
        expected = layers.convolution(x, weight, stride=stride, pad=pad) + bias
        kernel = implicit_gemm(
            *image,
            outputs,
            kernel_size=kernel_size,
            stride=stride,
            pad=pad,
            epilogue=Epilogue(bias=True),
            dtype=dtype,
        )
        packed = pack_gemm_weight(weight.transpose(0, 2, 3, 1))
        scheduled = tensorize(gemm(kernel, TARGET, SearchSpace()))
        name = f"convolution_{image[-1]}_{outputs}"
        problems[name] = (scheduled, [x, packed, bias], (expected.shape, dtype), expected)
    check_together(TARGET, problems)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_dynamic_rows(check_together, dtype, rng):
    n = tvm.tirx.Var("n", "int64")
    weight, bias = random_array(rng, 48, 64, dtype=dtype), random_array(rng, 48)
    problems = {}
    # Six has a common divisor with the rows of a tile.
    for pixels, batches in ((5, (1, 26, 77)), (6, (1, 43))):
        kernel = gemm_kernel((n, pixels), 64, 48, epilogue=GELU, dtype=dtype)
        scheduled = tensorize(gemm(kernel, TARGET, SearchSpace()))
        for rows in batches:
            x = random_array(rng, rows, pixels, 64, dtype=dtype)
            expected = layers.finish(GELU, x.astype(np.float64) @ weight.astype(np.float64).T, bias)
            inputs = [x, pack_gemm_weight(weight), bias]
            name = f"of_{rows}_{pixels}"
            problems[name] = (scheduled, inputs, (expected.shape, dtype), expected)
    check_together(TARGET, problems)


def test_tiles_divide_output_and_fit_shared_memory():
    for rows in (16, 64, 224, 832, 3200, 50176):
        for columns in (64, 80, 112, 144, 192, 320, 432, 1008, 2048):
            for depth in (64, 80, 112, 160, 288, 384, 2048):
                tile = default_tile(rows, columns, depth, 99 * 1024)
                high, wide = tile.warp_rows * tile.rows * 16, tile.warp_columns * tile.columns * 16
                assert rows % high == columns % wide == depth % (16 * tile.depth) == 0
                assert tile.warp_rows * tile.warp_columns <= 4
                # The sums of a thread leave enough of its 255 registers for operands.
                assert tile.rows * tile.columns * 8 <= 160
                assert tile.shared_bytes <= 99 * 1024


def test_small_matmul_gets_smaller_tiles():
    large, small = default_tile(50176, 512, 128, 2**17), default_tile(832, 512, 128, 2**17)
    assert small.rows * small.warp_rows * small.columns * small.warp_columns < (
        large.rows * large.warp_rows * large.columns * large.warp_columns
    )


def test_refuses_other_kernels():
    assert gemm(layer_norm((8,), 16, eps=1e-6), TARGET, SearchSpace()) == Refusal(
        "schedules kernel 'gemm'; this is 'layer_norm'"
    )


@pytest.mark.parametrize(("rows", "wide"), [("n", True), (2**26, True), (2**20, False)], ids=str)
def test_offsets_of_asynchronous_copies(cuda_code, rows, wide):
    """TVM's function takes an int: offsets beyond are added to the address, in 64 bits."""
    size = tvm.tirx.Var("n", "int64") if rows == "n" else rows
    kernel = gemm_kernel((size, 6), 64, 48, dtype="float16")
    code = cuda_code(gemm(kernel, TARGET, SearchSpace()), TARGET)
    copies = [line for line in code.splitlines() if "cp_async_legacy" in line and "x_ptr" in line]
    assert len(copies) > 2
    added = [re.search(r"\(&\(x_ptr\[.*\]\)\), \(int64_t\)0[,)]", copy) for copy in copies]
    assert all(added) if wide else not any(added)
