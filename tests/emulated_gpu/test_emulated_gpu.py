"""Errors that the emulated GPU detects, and kernels without errors."""

import numpy as np
import pytest
from tvm.script import tirx as T

from dcnv3_tvm.targets import resolve_target
from emulated_gpu import nvcc

COPY = 'asm volatile("cp.async.cg.shared.global [%0], [%1], %2;" :: "r"(to), "l"(from), "n"(16));'
COMMIT = 'asm volatile("cp.async.commit_group;" : : );'
WAIT = 'asm volatile("cp.async.wait_group 0;" : : : "memory");'


REVERSE = """
  __shared__ alignas(64) float tile[64];
  tile[threadIdx.x] = x[blockIdx.x * 64 + threadIdx.x];
  %s
  out[blockIdx.x * 64 + threadIdx.x] = tile[63 - threadIdx.x];
"""


def test_shared_memory(run, rng):
    x = rng.standard_normal(192).astype("float32")
    expected = x.reshape(3, 64)[:, ::-1].ravel()
    for result in run(REVERSE % "__syncthreads();", x, 192, blocks=3):
        np.testing.assert_array_equal(result, expected)


def test_missing_barrier_gives_nan(run, rng):
    x = rng.standard_normal(64).astype("float32")
    results = run(REVERSE % "", x, 64)
    assert all(np.isnan(result).any() for result in results)


COPIED = """
  extern __shared__ __align__(64) uchar buffer[];
  float *shared = (float *)buffer;
  unsigned to = __cvta_generic_to_shared(shared + 4 * threadIdx.x);
  const float *from = x + 4 * threadIdx.x;
  %s
  for (int i = 0; i < 4; ++i) out[4 * threadIdx.x + i] = shared[4 * threadIdx.x + i];
"""


def test_asynchronous_copy_without_wait_gives_nan(run, rng):
    x = rng.standard_normal(256).astype("float32")
    for result in run(COPIED % (COPY + COMMIT + WAIT), x, 256):
        np.testing.assert_array_equal(result, x)
    late, early = run(COPIED % (COPY + COMMIT), x, 256)
    assert np.isnan(late).all()
    np.testing.assert_array_equal(early, x)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("out[threadIdx.x] = ((float4 *)(x + threadIdx.x))->x;", "a misaligned access: thread (1,"),
        (
            "out[(size_t)1 << 40] = x[0];",
            "unmapped memory: thread (0, 0, 0) of block (0,",
        ),
        ("if (threadIdx.x < 40) __syncthreads();", "deadlock: (40, 0, 0) in line 0"),
        (
            "if (threadIdx.x == 3) __syncthreads();\n else __syncthreads();",
            "deadlock: (3, 0, 0) in line",
        ),
        (
            "if (threadIdx.x != 5) out[0] = __shfl_sync(__activemask(), x[0], 0, 32);",
            "deadlock",
        ),
        ("out[0] = __shfl_down_sync(255, x[0], 1, 32);", "(8, 0, 0) of block (0, 0, 0)"),
        (
            "if (threadIdx.x < 8) out[0] = __shfl_sync(511, x[0], 0, 32);",
            "deadlock",
        ),
        (
            "unsigned to = __cvta_generic_to_shared(emulated::shared + 4); float *from = x;" + COPY,
            "an address of shared memory is misaligned",
        ),
        ("__cvta_generic_to_shared(x);", "an address is not in shared memory"),
        (
            'asm volatile("setp.neu.f32 p, %1, 0f0; @p red.global.add.v2.f32 [%0], {%2, %3};"'
            ' : : "l"(out + 1), "f"(x[0]), "f"(x[1]), "f"(x[2]) : "memory");',
            "an address of a vector to add to is misaligned",
        ),
    ],
)
def test_errors_are_detected(run, body, message):
    assert message in run(body, np.zeros(256), 256)


def test_warp_shuffle(run, rng):
    x = rng.standard_normal(64).astype("float32")
    body = """
  float sum = x[threadIdx.x];
  for (int by = 16; by; by /= 2) sum += __shfl_xor_sync(__activemask(), sum, by, 32);
  out[threadIdx.x] = sum;
"""
    for result in run(body, x, 64):
        np.testing.assert_allclose(result, np.repeat(x.reshape(2, 32).sum(1), 32), rtol=1e-4)


def test_shuffles_of_parts_of_a_warp(run, rng):
    """By mask, by segment, and in a warp that is not full."""
    x = rng.standard_normal(40).astype("float32")
    body = """
  int i = threadIdx.x;
  unsigned half = i < 32 ? 65535u << i / 16 * 16 : 255;
  out[i] = __shfl_xor_sync(half, x[i], 3, 32);
  out[i + 40] = __shfl_down_sync(__activemask(), x[i], 5, 16);
  out[i + 80] = __shfl_xor_sync(__activemask(), x[i], 8, 32);
  out[i + 120] = __shfl_xor_sync(half, x[i], 16, 32);
"""
    lane = np.arange(40)
    expected = [
        x[lane ^ 3],
        x[np.where(lane % 16 < 11, lane + 5, lane) % 40],
        x[(lane ^ 8) % 40],
        x * np.nan,
    ]
    expected[1][35:] = expected[2][32:] = np.nan  # from threads that do not exist
    for result in run(body, x, 160, threads=40):
        np.testing.assert_array_equal(result, np.concatenate(expected))


def test_half_is_rounded_like_numpy(run, rng):
    body = "for (int i = threadIdx.x; i < 4096; i += 64) out[i] = float(half(x[i]));"
    x = rng.standard_normal(4096) * 2.0 ** rng.integers(-28, 18, 4096)
    x[:6] = [0.0, -0.0, np.inf, -np.inf, 65520.0, 65519.0]
    x = x.astype("float32")
    with np.errstate(over="ignore"):
        expected = x.astype("float16").astype("float32")
    for result in run(body, x, 4096):
        np.testing.assert_array_equal(result, expected)


def test_approximate_arithmetic(run, rng):
    """As inexact as what nvcc's options allow, and not more."""
    body = """
  int i = threadIdx.x;
  out[i] = (x[i] / x[i + 64]);
  out[i + 64] = sqrtf(x[i]);
  out[i + 128] = exp2f(x[i]);
  out[i + 192] = (x[i] * 1e-30f) * 1e30f;
"""
    x = np.exp2(rng.uniform(-40, 6, 128)).astype("float32")
    whole = x[:64].astype(np.float64)
    real = np.concatenate([whole / x[64:], np.sqrt(whole), np.exp2(whole), whole])
    exact, _ = run(body, x, 256)
    np.testing.assert_allclose(exact[:192], real[:192], rtol=2**-23)
    assert exact[192:].all()
    options = ("--ftz=true", "--prec-div=false", "--prec-sqrt=false")
    found, _ = run(body, x, 256, options=options)
    errors = np.abs(found[:192] / real[:192] - 1).reshape(3, 64).max(1) * 2**23
    assert np.all(errors > [1, 0.5, 1])
    assert np.all(errors < [3, 2, 3])
    np.testing.assert_array_equal(found[192:] == 0, whole * 1e-30 < 2.0**-126)


def test_fast_math_is_not_emulated():
    """Its powf is NaN for negative bases, its tanhf and sinf are inaccurate."""
    with pytest.raises(ValueError, match="unsupported option: --use_fast_math"):
        nvcc.translate('extern "C" __global__ void k(float* x) {\n}\n', ["--use_fast_math"])


def test_unsupported_ptx_raises():
    kernel = 'extern "C" __global__ void k(float* x) {\n  asm volatile("bar.red;" : : );\n}\n'
    with pytest.raises(ValueError, match=r'unsupported PTX: "bar\.red;"'):
        nvcc.translate(kernel)


TARGET = resolve_target("cuda-sm90")


def test_result_that_depends_on_the_order_of_threads_raises(gpu):
    @T.prim_func(s_tir=True)
    def last(x: T.Buffer((64,), "float32"), out: T.Buffer((1,), "float32")):
        for i in T.thread_binding(64, "threadIdx.x"):
            with T.sblock("store"):
                v = T.axis.spatial(64, i)
                out[0] = x[v]

    with pytest.raises(RuntimeError, match="depends on the order of threads"):
        gpu.run(last, TARGET, [np.arange(64, dtype="float32")], [((1,), "float32")])


def test_write_outside_an_output_raises(gpu):
    @T.prim_func(s_tir=True)
    def write_outside(x: T.Buffer((64,), "float32"), out: T.Buffer((60,), "float32")):
        for i in T.thread_binding(64, "threadIdx.x"):
            with T.sblock("store"):
                v = T.axis.spatial(64, i)
                out[v] = x[v]

    with pytest.raises(RuntimeError, match="main_kernel: write outside"):
        gpu.run(write_outside, TARGET, [np.zeros(64, "float32")], [((60,), "float32")])


@pytest.mark.parametrize(
    ("blocks", "threads", "message"),
    [(70000, 1, "too many blocks"), (1, 2048, "too many threads")],
)
def test_launch_beyond_the_limits_raises(gpu, blocks, threads, message):
    @T.prim_func(s_tir=True)
    def copy(x: T.handle, out: T.handle):
        X = T.match_buffer(x, (blocks, threads), "float32")
        Out = T.match_buffer(out, (blocks, threads), "float32")
        for i in T.thread_binding(blocks, "blockIdx.y"):
            for j in T.thread_binding(threads, "threadIdx.x"):
                with T.sblock("store"):
                    row, column = T.axis.remap("SS", [i, j])
                    Out[row, column] = X[row, column]

    shape = (blocks, threads)
    with pytest.raises(RuntimeError, match=f"main_kernel: {message}"):
        gpu.run(copy, TARGET, [np.zeros(shape, "float32")], [(shape, "float32")])
