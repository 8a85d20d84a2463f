import numpy as np
import pytest
from tvm import tirx

from dcnv3_tvm.kernels.depthwise import depthwise as depthwise_kernel
from dcnv3_tvm.kernels.layer_norm import layer_norm as layer_norm_kernel
from dcnv3_tvm.schedules.gpu.layer_norm import layer_norm
from dcnv3_tvm.schedules.rule import Refusal
from dcnv3_tvm.schedules.space import SearchSpace
from dcnv3_tvm.targets import resolve_target
from helpers import layers
from helpers.arrays import random_array

TARGET = resolve_target("cuda-sm90")
TYPES = [
    {},
    {"x_dtype": "float16", "out_dtype": "float16"},
    {"x_dtype": "bfloat16", "residual_dtype": "bfloat16", "out_dtype": "bfloat16"},
    {"x_dtype": "float16", "residual_dtype": "float32", "out_dtype": "float32"},
    {"x_dtype": "float32", "residual_dtype": "float16", "out_dtype": "bfloat16"},
]


def run(gpu, func, inputs, shape, dtype):
    (result,) = gpu.run(layer_norm(func, TARGET, SearchSpace()), TARGET, inputs, [(shape, dtype)])
    return result


def problem(rng, shape, lead=None, **options):
    """Return the scheduled kernel, its inputs and output, and the result in float64."""
    dtypes = [options.get(f"{name}_dtype", "float32") for name in ("x", "residual", "out")]
    x, residual = (random_array(rng, *shape, dtype=dtype) for dtype in dtypes[:2])
    gamma, beta = (random_array(rng, shape[-1]) for _ in range(2))
    func = layer_norm_kernel(lead or shape[:-1], shape[-1], eps=1e-6, **options)
    given = [x, gamma, beta, *([residual] if options.get("residual") else [])]
    reference = layers.activation(
        options.get("activation"), layers.layer_norm(x, gamma, beta, 1e-6)
    )
    if options.get("residual"):
        reference = reference + residual.astype("float64")
    return layer_norm(func, TARGET, SearchSpace()), given, (shape, dtypes[2]), reference


SHAPES = [
    (2, 3, 5, 64),
    (49, 80),
    (13, 17),
    (1, 1),
    (1, 768),
    (3, 112),
    (2, 2560),
    (3, 6144),
    # Not a full block.
    (1, 4, 4, 16),
    (3, 1, 2, 64),
    (1, 1, 1, 64),
]


def test_sizes(rng, check_together):
    problems = {"_".join(map(str, ("of", *shape))): problem(rng, shape) for shape in SHAPES}
    check_together(TARGET, problems)


@pytest.mark.parametrize("channels", [80, 13])
def test_types(rng, check_together, channels):
    problems = {}
    for types in TYPES:
        name, shape = "_".join(("of", *types.values())), (37, channels)
        problems[name] = problem(rng, shape, **types)
        problems[f"{name}_residual"] = problem(
            rng, shape, activation="gelu", residual=True, **types
        )
    check_together(TARGET, problems)


def test_dynamic_sizes(rng, check_together):
    n, h = tirx.Var("n", "int64"), tirx.Var("h", "int64")
    problems = {}
    for shape in ((2, 7, 32), (1, 5, 32)):
        problems[f"batch{shape[0]}"] = problem(rng, shape, lead=(n, shape[1]))
        problems[f"size{shape[0]}"] = problem(rng, shape, lead=(n, h), x_dtype="float16")
    check_together(TARGET, problems)


def test_large_mean_costs_no_accuracy(gpu, rng):
    x = (rng.standard_normal((16, 64)) + 4096.0).astype("float32")
    one, zero = np.ones(64, "float32"), np.zeros(64, "float32")
    func = layer_norm_kernel((16,), 64, eps=1e-6)
    result = run(gpu, func, [x, one, zero], x.shape, "float32")
    # The mean is rounded to 2**-11 here; E[x^2] - E[x]^2 would have errors of order 1.
    assert np.abs(result - layers.layer_norm(x, one, zero, 1e-6)).max() < 4096 * 2.0**-22


def test_reads_and_writes_a_row_once_in_vectors(cuda_code):
    types = {"x_dtype": "float16", "out_dtype": "float16"}
    func = layer_norm_kernel((64, 49), 320, eps=1e-6, activation="gelu", **types)
    code = cuda_code(layer_norm(func, TARGET, SearchSpace()), TARGET)
    # 40 vectors of 8 elements on 8 threads.
    assert code.count("(x_ptr +") == code.count("(out_ptr +") == 40 // 8
    assert all("uint4" in line for line in code.splitlines() if "out_ptr +" in line)
    assert "x_ptr[" not in code
    assert "out_ptr[" not in code
    assert "gamma_ptr[" not in code
    assert "beta_ptr[" not in code


@pytest.mark.parametrize(("channels", "warp"), [(64, True), (2560, True), (6144, False)])
def test_sums_over_threads(cuda_code, channels, warp):
    func = layer_norm_kernel((64, 49), channels, eps=1e-6, x_dtype="float16")
    code = cuda_code(layer_norm(func, TARGET, SearchSpace()), TARGET)
    assert "__shfl_down_sync" in code
    assert ("__syncthreads" not in code) == warp
    assert ("__shared__" not in code) == warp


@pytest.mark.parametrize("channels", [4096, 6144])
def test_barrier_before_sums_of_several_warps_are_read(cuda_code, channels):
    func = layer_norm_kernel((64, 49), channels, eps=1e-6, x_dtype="float16")
    code = cuda_code(layer_norm(func, TARGET, SearchSpace()), TARGET)
    for name in ("total", "square"):
        stored, read = code.split(f" {name}_shared_ptr[0] = ")[1].split(f"{name}_shared_ptr[0]", 1)
        assert "__syncthreads();" in stored
        assert read
    # TVM omits the barrier if the element is indexed by another thread axis.
    assert "_shared_ptr[((int)threadIdx.y)]" not in code


def test_refuses_rows_that_do_not_fit_registers():
    kernel = layer_norm_kernel((3,), 16 * 12289, eps=1e-6)
    assert layer_norm(kernel, TARGET, SearchSpace()) == Refusal(
        "keeps at most 128 elements of a row in the registers of a thread; "
        "196624 channels need 49156"
    )


def test_refuses_other_kernels():
    kernel = depthwise_kernel(1, 4, 4, 8, kernel_size=(3, 3), pad=(1, 1), bias=True)
    assert layer_norm(kernel, TARGET, SearchSpace()) == Refusal(
        "schedules kernel 'layer_norm'; this is 'depthwise'"
    )
