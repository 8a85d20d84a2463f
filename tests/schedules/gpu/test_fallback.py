import re

import numpy as np
import pytest
import tvm
from tvm import relax, s_tir, tirx
from tvm.script import tirx as T

from dcnv3_tvm.kernels.depthwise import depthwise as depthwise_kernel
from dcnv3_tvm.kernels.layer_norm import layer_norm as layer_norm_kernel
from dcnv3_tvm.schedules import schedule_module
from dcnv3_tvm.schedules.gpu.fallback import fallback
from dcnv3_tvm.schedules.gpu.launch import launches
from dcnv3_tvm.schedules.space import SearchSpace
from dcnv3_tvm.targets import resolve_target
from helpers import layers
from helpers.structure import buffer_scopes, nodes

TARGET = resolve_target("cuda-sm90")


def softmax(x, axis=-1):
    power = np.exp(x - x.max(axis, keepdims=True))
    return power / power.sum(axis, keepdims=True)


def mix(x, y, gate):
    one = relax.const(1.0, "float32")
    inverse = relax.op.subtract(one, gate)
    return relax.op.add(relax.op.multiply(x, inverse), relax.op.multiply(y, gate))


def pool(x):
    return relax.op.nn.avg_pool2d(x, (3, 3), (2, 2), (1, 1), layout="NHWC", count_include_pad=True)


def pooled(x):
    framed = np.pad(x, [(0, 0), (1, 1), (1, 1), (0, 0)])
    windows = np.lib.stride_tricks.sliding_window_view(framed, (3, 3), axis=(1, 2))
    return windows[:, ::2, ::2].mean((-1, -2))


# With few and with many results, which are distributed over threads differently.
CASES = {
    "add": (relax.op.add, np.add, [(2, 9, 9, 64), (64,)]),
    "add_many": (relax.op.add, np.add, [(20, 90, 9, 64), (64,)]),
    "mix": (mix, lambda x, y, g: x * (1 - g) + y * g, [(3, 40, 50, 48)] * 3),
    "relu_of_odd_add": (
        lambda x, y: relax.op.nn.relu(relax.op.add(x, y)),
        lambda x, y: np.maximum(x + y, 0),
        [(3, 41, 53, 17), (3, 41, 53, 17)],
    ),
    "broadcast": (
        lambda x: relax.op.broadcast_to(x, (9, 40, 50, 16)),
        lambda x: np.broadcast_to(x, (9, 40, 50, 16)),
        [(9, 40, 50, 1)],
    ),
    "broadcast_of_a_part": (
        lambda x, y: relax.op.add(relax.op.strided_slice(x, [1], [8], [72]), y),
        lambda x, y: x[:, 8:72] + y,
        [(4000, 80), (64,)],
    ),
    "mean_of_pixels": (
        lambda x: relax.op.mean(x, [1, 2]),
        lambda x: x.mean((1, 2)),
        [(2, 7, 7, 300)],
    ),
    "mean_of_pixels_many": (
        lambda x: relax.op.mean(x, [1, 2]),
        lambda x: x.mean((1, 2)),
        [(128, 7, 5, 300)],
    ),
    "mean_of_channels": (lambda x: relax.op.mean(x, [-1]), lambda x: x.mean(-1), [(40, 50, 60)]),
    "mean_of_long_rows": (lambda x: relax.op.mean(x, [-1]), lambda x: x.mean(-1), [(5, 3001)]),
    "variance": (lambda x: relax.op.variance(x, [-1]), lambda x: x.var(-1), [(5, 301)]),
    "variance_of_pixels": (
        lambda x: relax.op.variance(x, [1, 2]),
        lambda x: x.var((1, 2)),
        [(2, 7, 7, 300)],
    ),
    "sum_to_a_scalar": (relax.op.sum, np.sum, [(3, 5)]),
    "share_of_the_sum": (
        lambda x: relax.op.divide(x, relax.op.sum(x)),
        lambda x: x / x.sum(),
        [(3, 5)],
    ),
    "average_pool": (pool, pooled, [(2, 13, 9, 20)]),
    "softmax": (relax.op.nn.softmax, softmax, [(50, 3, 17)]),
    "softmax_of_long_rows": (relax.op.nn.softmax, softmax, [(3, 2077)]),
    "softmax_of_columns": (
        lambda x: relax.op.nn.softmax(x, axis=1),
        lambda x: softmax(x, 1),
        [(7, 40, 9)],
    ),
    "matmul": (relax.op.matmul, np.matmul, [(4, 19, 33), (4, 33, 48)]),
    "matmul_of_one_row": (relax.op.matmul, np.matmul, [(2, 4, 1, 70), (2, 4, 70, 49)]),
    "transpose": (
        lambda x: relax.op.permute_dims(x, [0, 2, 3, 1]),
        lambda x: x.transpose(0, 2, 3, 1),
        [(2, 48, 40, 41)],
    ),
    "transpose_of_three_channels": (
        lambda x: relax.op.permute_dims(x, [0, 2, 3, 1]),
        lambda x: x.transpose(0, 2, 3, 1),
        [(2, 3, 40, 41)],
    ),
    "transpose_within_heads": (
        lambda x: relax.op.permute_dims(x, [0, 2, 1, 3]),
        lambda x: x.transpose(0, 2, 1, 3),
        [(2, 49, 16, 64)],
    ),
    "relu_of_transpose": (
        lambda x, y: relax.op.nn.relu(relax.op.add(relax.op.permute_dims(x, [0, 3, 1, 2]), y)),
        lambda x, y: np.maximum(x.transpose(0, 3, 1, 2) + y, 0),
        [(2, 7, 9, 70), (2, 70, 7, 9)],
    ),
    "concatenation": (
        lambda x, y: relax.op.concat([x, y], -1),
        lambda x, y: np.concatenate([x, y], -1),
        [(5000, 64), (5000, 8)],
    ),
}


def legalized(build, shapes, dtype="float32"):
    """Return the functions of one Relax operation."""
    builder = relax.BlockBuilder()
    names = [relax.Var(f"x{i}", relax.TensorType(s, dtype)) for i, s in enumerate(shapes)]
    with builder.function("main", names):
        with builder.dataflow():
            result = builder.emit_output(builder.emit(build(*names)))
        builder.emit_func_output(result)
    passes = [
        relax.transform.DecomposeOpsForInference(),
        relax.transform.LegalizeOps(),
        relax.transform.AnnotateTIROpPattern(),
        relax.transform.FuseOps(),
        relax.transform.FuseTIR(),
    ]
    return tvm.transform.Sequential(passes)(builder.get())


def kernels(code):
    return len(set(re.findall(r"__global__ void (?:__launch_bounds__\([\d, ]+\) )?(\w+)\(", code)))


def scheduled(module):
    """Schedule the kernels of a module."""
    module, rules = schedule_module(module, TARGET)
    assert {found.rule for found in rules.values()} == {"fallback"}
    return module


def scheduled_kernel(module):
    """Schedule a module of one kernel."""
    functions = scheduled(module).functions.values()
    (func,) = (func for func in functions if isinstance(func, tirx.PrimFunc))
    return func


def alignments(func):
    """Return the alignment (buffer, axis, factor, offset) of the stored buffer of each block."""
    return {
        block.name_hint: tuple(map(int, found))
        for block in nodes(func.body, s_tir.SBlock)
        for found in block.annotations.get("buffer_dim_align", ())
    }


@pytest.fixture
def codes(cuda_code):
    """Return the CUDA code of each kernel of a module."""

    def generate(module):
        functions = scheduled(module).functions.values()
        return [cuda_code(func, TARGET) for func in functions if isinstance(func, tirx.PrimFunc)]

    return generate


def run(gpu, module, arrays):
    (result,) = gpu.run_module(scheduled(module), TARGET, arrays)
    return result


def run_kernel(gpu, func, inputs, shape):
    (result,) = gpu.run(func, TARGET, inputs, [(shape, "float32")])
    return result


@pytest.mark.parametrize("name", CASES)
def test_stock_operators(gpu, rng, assert_close, name):
    build, reference, shapes = CASES[name]
    arrays = [rng.standard_normal(shape).astype("float32") for shape in shapes]
    result = run(gpu, legalized(build, shapes), arrays)
    assert_close(result, reference(*(array.astype("float64") for array in arrays)))


@pytest.mark.parametrize("name", ["add", "mean_of_pixels", "softmax", "transpose", "matmul"])
def test_dynamic_batches(gpu, rng, assert_close, name):
    build, reference, shapes = CASES[name]
    arrays = [rng.standard_normal(shape).astype("float32") for shape in shapes]
    n = tirx.Var("n", "int64")
    dynamic = [(n, *shape[1:]) if len(shape) > 1 else shape for shape in shapes]
    result = run(gpu, legalized(build, dynamic), arrays)
    assert_close(result, reference(*(array.astype("float64") for array in arrays)))


@pytest.mark.parametrize(
    ("name", "channels"), [("mean_of_pixels", 48), ("mean_of_pixels", 16), ("transpose", 48)]
)
def test_dynamic_sizes(gpu, rng, assert_close, name, channels):
    n, h, w = (tirx.Var(name, "int64") for name in "nhw")
    x = rng.standard_normal((2, 7, 5, channels)).astype("float32")
    build, reference, _ = CASES[name]
    result = run(gpu, legalized(build, [(n, h, w, channels)]), [x])
    assert_close(result, reference(x.astype("float64")))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_types_use_vector_accesses(codes, gpu, rng, assert_close, dtype):
    x, y = (rng.standard_normal((160, 40, 48)).astype(dtype) for _ in range(2))
    module = legalized(relax.op.add, [x.shape, y.shape], dtype)
    result = run(gpu, module, [x, y])
    assert_close(result.astype("float64"), x.astype("float64") + y.astype("float64"), dtype)
    (code,) = codes(module)
    assert code.count("*(uint4*)(x0_ptr + ") == 1
    assert code.count("*(uint4*)(x1_ptr + ") == 1
    assert "[" not in "".join(re.findall(r"compute_ptr.", code))


def test_conversion_uses_vector_accesses(codes, gpu, rng):
    x = rng.standard_normal((160, 40, 48)).astype("float32")
    module = legalized(lambda x: relax.op.astype(x, "float16"), [x.shape])
    np.testing.assert_array_equal(run(gpu, module, [x]), x.astype("float16"))
    (code,) = codes(module)
    assert code.count("*(float4*)(x0_ptr + ") == 2


def test_softmax_is_one_kernel_with_warp_shuffles():
    func = scheduled_kernel(legalized(relax.op.nn.softmax, [(64, 16, 49)]))
    (extents,) = launches(func)
    assert extents["threadIdx.x"] == "32"
    assert buffer_scopes(func) == {"local"}


def test_threads_share_few_results_and_read_neighbours(codes):
    (code,) = codes(legalized(lambda x: relax.op.mean(x, [1, 2]), [(1, 7, 7, 1024)]))
    assert kernels(code) == 1
    (load,) = re.findall(r"x0_ptr\[(.*)\]\)", code)
    assert load.rstrip(")").endswith("+ ((int)threadIdx.x")
    assert "threadIdx.y) * 1024" in load
    # The thread that stored the sum reads it, because TVM inserts no barrier here.
    own = r"if \(\(\(int\)threadIdx\.y\) == 0\) \{\n    x0_red_shared_ptr.*\n    T_divide_ptr\["
    assert re.search(own, code)


@pytest.mark.parametrize("name", ["variance", "variance_of_pixels"])
def test_chained_reductions_have_barriers(codes, name):
    build, _, shapes = CASES[name]
    for code in codes(legalized(build, shapes)):
        assert not re.search(r"_shared_ptr\[[^]]*threadIdx", code)


def test_transpose_uses_shared_memory():
    module = legalized(lambda x: relax.op.permute_dims(x, [0, 3, 1, 2]), [(2, 28, 28, 64)])
    func = scheduled_kernel(module)
    assert buffer_scopes(func) == {"shared"}
    # A row stride of 32 k + 1 elements: a column has no bank conflicts.
    buffer, axis, factor, offset = alignments(func)["x0_shared"]
    assert (buffer, axis, factor, offset) == (0, 2, 32, 1)


@pytest.mark.parametrize("channels", [300, 1500])
def test_layer_norm(cuda_code, gpu, rng, assert_close, channels):
    x = rng.standard_normal((3, channels)).astype("float32")
    gamma, beta = (rng.standard_normal(channels).astype("float32") for _ in range(2))
    func = fallback(layer_norm_kernel((3,), channels, eps=1e-6), TARGET, SearchSpace())
    result = run_kernel(gpu, func, [x, gamma, beta], x.shape)
    assert_close(result, layers.layer_norm(x, gamma, beta, 1e-6))
    code = cuda_code(func, TARGET)
    assert kernels(code) == 1
    assert ("__syncthreads" in code) == (channels > 1024)


@pytest.mark.parametrize("normalized", [True, False])
def test_depthwise(gpu, rng, assert_close, normalized):
    x, weight = rng.standard_normal((1, 4, 5, 24)), rng.standard_normal((3, 3, 24))
    x, weight = x.astype("float32"), weight.astype("float32")
    one, zero = np.ones(24, "float32"), np.zeros(24, "float32")
    options = {"kernel_size": (3, 3), "pad": (1, 1), "norm_eps": 1e-6 if normalized else None}
    func = depthwise_kernel(1, 4, 5, 24, bias=True, **options)
    given = [x, weight, zero, *([one, zero] if normalized else [])]
    func = fallback(func, TARGET, SearchSpace())
    result = run_kernel(gpu, func, given, x.shape)
    sums = layers.depthwise(x, weight, stride=(1, 1), pad=(1, 1))
    assert_close(result, layers.layer_norm(sums, one, zero, 1e-6) if normalized else sums)


def test_opaque_block_gets_a_thread(cuda_code, gpu):
    @T.prim_func(s_tir=True)
    def scan(x: T.Buffer((8,), "float32"), out: T.Buffer((8,), "float32")):
        with T.sblock("root"), T.sblock("scan"):
            T.reads(x[0:8])
            T.writes(out[0:8])
            out[0] = x[0]
            for i in range(7):
                out[i + 1] = out[i] + x[i + 1]

    func = fallback(scan, TARGET, SearchSpace())
    result = run_kernel(gpu, func, [np.ones(8, "float32")], (8,))
    np.testing.assert_array_equal(result, np.arange(1, 9))
    assert kernels(cuda_code(func, TARGET)) == 1


def test_several_results_become_several_kernels(cuda_code, gpu):
    @T.prim_func(s_tir=True)
    def both(x: T.Buffer((8, 9), "float32"), a: T.Buffer((8, 9), "float32"), b: T.Buffer((8,))):
        for i, j in T.grid(8, 9):
            with T.sblock("double"):
                vi, vj = T.axis.remap("SS", [i, j])
                a[vi, vj] = x[vi, vj] * T.float32(2)
        for i, j in T.grid(8, 9):
            with T.sblock("sum"):
                vi, vj = T.axis.remap("SR", [i, j])
                with T.init():
                    b[vi] = T.float32(0)
                b[vi] = b[vi] + a[vi, vj]

    func = fallback(both, TARGET, SearchSpace())
    outputs = [((8, 9), "float32"), ((8,), "float32")]
    doubled, sums = gpu.run(func, TARGET, [np.ones((8, 9), "float32")], outputs)
    np.testing.assert_array_equal(doubled, 2)
    np.testing.assert_array_equal(sums, 18)
    assert kernels(cuda_code(func, TARGET)) == 2
