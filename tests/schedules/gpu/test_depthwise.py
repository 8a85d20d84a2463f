import re

import pytest
from tvm import tirx

from dcnv3_tvm.kernels.depthwise import depthwise as plain_depthwise_kernel
from dcnv3_tvm.kernels.layer_norm import layer_norm as layer_norm_kernel
from dcnv3_tvm.schedules.gpu.depthwise import depthwise
from dcnv3_tvm.schedules.rule import Refusal
from dcnv3_tvm.schedules.space import SearchSpace
from dcnv3_tvm.targets import resolve_target
from helpers import layers
from helpers.arrays import random_array
from helpers.gpu_kernels import depthwise as depthwise_kernel

TARGET = resolve_target("cuda-sm90")
TYPES = [
    {"x_dtype": "float16", "out_dtype": "float16"},
    {"x_dtype": "bfloat16", "out_dtype": "bfloat16"},
    {"x_dtype": "float16", "out_dtype": "float32"},
    {"x_dtype": "float32", "out_dtype": "bfloat16"},
]


def problem(
    rng,
    shape,
    given=None,
    kernel=(3, 3),
    stride=(1, 1),
    pad=(1, 1),
    normalized=True,
    activation="gelu",
    **types,
):
    """Return the scheduled kernel, its inputs and output, and the result in float64."""
    *sizes, channels = shape
    x = random_array(rng, *shape, dtype=types.get("x_dtype", "float32"))
    weight = random_array(rng, *kernel, channels)
    bias, gamma, beta = (random_array(rng, channels) for _ in range(3))
    func = depthwise_kernel(
        *(given or sizes),
        channels,
        kernel_size=kernel,
        stride=stride,
        pad=pad,
        bias=True,
        norm_eps=1e-6 if normalized else None,
        activation=activation,
        **types,
    )
    sums = layers.depthwise(x, weight, stride=stride, pad=pad) + bias
    normal = layers.layer_norm(sums, gamma, beta, 1e-6) if normalized else sums
    arrays = [x, weight, bias, *([gamma, beta] if normalized else [])]
    dtype = types.get("out_dtype", "float32")
    scheduled = depthwise(func, TARGET, SearchSpace())
    expected = layers.activation(activation, normal)
    return scheduled, arrays, (sums.shape, dtype), expected


SHAPES = [
    (1, 14, 28, 64),
    (2, 7, 7, 80),
    (64, 14, 9, 16),
    (1, 3, 1, 13),
    (1, 1, 6, 24),
    (3, 9, 11, 112),
    (2, 3, 5, 1536),
    (1, 2, 3, 2560),
]


def test_sizes(rng, check_together):
    problems = {"_".join(map(str, ("of", *shape))): problem(rng, shape) for shape in SHAPES}
    check_together(TARGET, problems)


@pytest.mark.parametrize("shape", [(2, 7, 5, 80), (128, 14, 13, 16), (1, 5, 6, 13)])
def test_types(rng, check_together, shape):
    problems = {"_".join(types.values()): problem(rng, shape, **types) for types in TYPES}
    check_together(TARGET, problems)


def test_without_normalization(rng, check_together):
    plain = problem(rng, (1, 7, 9, 32), normalized=False, activation=None)
    gelu = problem(rng, (64, 13, 9, 96), normalized=False, **TYPES[0])
    check_together(TARGET, {"plain": plain, "gelu": gelu})


def test_large_windows_and_strides(rng, check_together):
    shape, uneven = (1, 11, 12, 16), {"kernel": (2, 5), "stride": (2, 3), "pad": (0, 1)}
    problems = {
        "of_5": problem(rng, shape, kernel=(5, 5), pad=(2, 2), **TYPES[0]),
        "of_9": problem(rng, (1, 9, 10, 16), kernel=(9, 9), pad=(4, 4)),
        "uneven": problem(rng, shape, **uneven, **TYPES[1]),
    }
    shape, given = (2, 11, 13, 16), [tirx.Var(name, "int64") for name in "nhw"]
    problems["dynamic_9"] = problem(rng, shape, given, kernel=(9, 9), pad=(4, 4))
    problems["dynamic_uneven"] = problem(rng, shape, given, **uneven, **TYPES[1])
    check_together(TARGET, problems)


def test_dynamic_sizes(rng, check_together):
    n, h = tirx.Var("n", "int64"), tirx.Var("h", "int64")
    problems = {}
    for shape in ((1, 14, 14, 32), (3, 9, 5, 32)):
        batch, height = (n, *shape[1:3]), (n, h, shape[2])
        problems[f"batch{shape[0]}"] = problem(rng, shape, given=batch, **TYPES[0])
        problems[f"height{shape[0]}"] = problem(rng, shape, given=height, **TYPES[0])
    check_together(TARGET, problems)


def test_dynamic_width(rng, check_together):
    """Rows longer than a tile, rows shorter than a run, and one row by all warps."""
    n, h, w = (tirx.Var(name, "int64") for name in "nhw")
    problems = {}
    for shape in ((2, 9, 70, 24), (1, 1, 1, 2560), (3, 5, 1, 80)):
        width = (*shape[:2], w)
        problems[f"all{shape[-1]}"] = problem(rng, shape, given=(n, h, w), **TYPES[0])
        problems[f"width{shape[-1]}"] = problem(rng, shape, given=width, normalized=False)
    check_together(TARGET, problems)


def test_loads_and_stores_vectors_and_keeps_sums_in_registers(cuda_code):
    func = depthwise_kernel(
        64,
        28,
        28,
        128,
        kernel_size=(3, 3),
        pad=(1, 1),
        bias=True,
        norm_eps=1e-6,
        activation="gelu",
        x_dtype="float16",
        out_dtype="float16",
    )
    code = cuda_code(depthwise(func, TARGET, SearchSpace()), TARGET)
    assert "__shared__" not in code
    assert "__shfl_down_sync" in code
    # A run of four pixels reads six pixels in each of three rows.
    assert code.count("= *(uint4*)(x_ptr + ") == 18
    assert code.count("*(uint4*)(out_ptr + ") == 4
    assert code.count("= *(float4*)(weight_ptr + ") == 9 * 2
    assert not any(f"{name}_ptr[" in code for name in ("x", "out", "weight", "gamma", "beta"))


@pytest.mark.parametrize("pixels", [7, 16])
def test_barrier_before_sums_of_several_warps_are_read(cuda_code, pixels):
    func = depthwise_kernel(
        1, pixels, pixels, 4096, kernel_size=(3, 3), pad=(1, 1), bias=True, norm_eps=1e-6
    )
    code = cuda_code(depthwise(func, TARGET, SearchSpace()), TARGET)
    for name in ("total", "square"):
        stored, read = code.split(f" {name}_shared_ptr[0] = ")[1].split(f"{name}_shared_ptr[0]", 1)
        assert "__syncthreads();" in stored
        assert read
    # TVM omits the barrier if the element is indexed by another thread axis.
    assert not re.search(r"(total|square)_shared_ptr\[[^]]*threadIdx", code)


def test_refuses_channels_that_do_not_fit_registers():
    kernel = depthwise_kernel(1, 4, 4, 65536, kernel_size=(3, 3), pad=(1, 1), bias=True)
    assert depthwise(kernel, TARGET, SearchSpace()) == Refusal(
        "keeps at most 192 values in the registers of a thread; "
        "65536 channels with a 3x3 window need 268"
    )


def test_refuses_a_kernel_without_runs():
    kernel = plain_depthwise_kernel(1, 4, 4, 16, kernel_size=(3, 3), pad=(1, 1), bias=True)
    assert depthwise(kernel, TARGET, SearchSpace()) == Refusal("needs the output pixels in runs")


def test_refuses_other_kernels():
    assert depthwise(layer_norm_kernel((3,), 16, eps=1e-6), TARGET, SearchSpace()) == Refusal(
        "schedules kernel 'depthwise'; this is 'layer_norm'"
    )
