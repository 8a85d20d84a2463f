"""What the emulated GPU counts, in kernels whose traffic is known."""

import ctypes
import dataclasses

import numpy as np
import pytest

from dcnv3_tvm.kernels import gemm
from dcnv3_tvm.kernels.depthwise import depthwise as depthwise_kernel
from dcnv3_tvm.kernels.layer_norm import layer_norm as layer_norm_kernel
from dcnv3_tvm.kernels.matmul import Epilogue
from dcnv3_tvm.op import tensorir
from dcnv3_tvm.schedules.gpu import dcnv3 as sampling
from dcnv3_tvm.schedules.gpu import depthwise, tensorize
from dcnv3_tvm.schedules.gpu import gemm as products
from dcnv3_tvm.schedules.space import SearchSpace
from dcnv3_tvm.spec import DCNv3Spec
from dcnv3_tvm.targets import resolve_target
from emulated_gpu.nvcc import COUNTING
from emulated_gpu.traffic import PRODUCT_FLOPS, SECTOR, GlobalTraffic, SharedTraffic, traffic_of
from helpers import operator
from helpers.specs import random_inputs

TARGET = resolve_target("cuda-sm90")


def aligned(numbers):
    """Zeros that begin where a line of a cache does."""
    array = np.zeros(numbers + 32, np.float32)
    return array[-array.ctypes.data // 4 % 32 :][:numbers]


@pytest.fixture
def count(kernel, monkeypatch):
    """Count what the body of a kernel of one warp moves."""
    monkeypatch.setenv(COUNTING, "1")

    def call(body, x=None, *, blocks=1, **options):
        made = kernel(body, 32)
        out, given = aligned(4096), aligned(4096)
        if x is not None:
            given[:] = x
        assert made.launch(out, given, blocks=blocks, **options) is None
        numbers = ctypes.c_int()
        read = made.library.emulated_traffic
        read.restype = ctypes.POINTER(ctypes.c_uint64)
        counted = read(ctypes.byref(numbers))[: numbers.value]
        return traffic_of("launch k\ntraffic " + " ".join(map(str, counted))), out

    return call


def test_sixteen_bytes_a_thread(count):
    traffic, out = count("((float4 *)out)[threadIdx.x] = ((float4 *)x)[threadIdx.x];", 3.0)
    assert traffic.loads == traffic.stores == GlobalTraffic(1, 16, 16, 16)
    assert traffic.loads.efficiency == 1.0
    assert traffic.shared_loads == traffic.shared_stores == SharedTraffic(0, 0, 0)
    assert (traffic.blocks, traffic.counted_blocks, traffic.products) == (1, 1, 0)
    assert traffic.level_two_bytes == 2 * 512
    assert (out[:128] == 3).all()
    assert not out[128:].any()


def test_every_second_number(count):
    """Half of each sector is not needed, until the other load needs it: from L1, if it keeps it."""
    traffic, _ = count("out[threadIdx.x] = x[2 * threadIdx.x] + x[2 * threadIdx.x + 1];")
    assert traffic.loads == GlobalTraffic(2, 16, 8, 8)
    assert traffic.loads.efficiency == 0.5
    assert traffic.stores == GlobalTraffic(1, 4, 4, 4)


def test_what_all_threads_read_is_read_once(count):
    traffic, _ = count("float y = x[5];\nout[threadIdx.x] = y + x[5];")
    assert traffic.loads == GlobalTraffic(1, 1, 1, 1)


def test_halves(count):
    """A number of two bytes is an access of two, in a vector it is one of sixteen."""
    body = """
  half *from = (half *)x, *to = (half *)out, some[8];
  *(uint4 *)some = *(uint4 *)(from + 8 * threadIdx.x);
  for (int i = 0; i < 8; ++i) some[i] = some[i] * some[i];
  *(uint4 *)(to + 8 * threadIdx.x) = *(uint4 *)some;
  to[256 + threadIdx.x] = from[256 + threadIdx.x] + __float2half(1.0f);
"""
    traffic, _ = count(body)
    assert traffic.loads == traffic.stores == GlobalTraffic(2, 18, 18, 18)


def test_vectors_that_are_made_are_stored_at_once(count):
    body = """
  uint4 some;
  if (threadIdx.x < 16) {
    some = *(uint4 *)(x + 4 * threadIdx.x);
  } else {
    some = make_uint4(1, 2, 3, 4);
  }
  *(uint4 *)(out + 4 * threadIdx.x) = some;
"""
    traffic, _ = count(body)
    assert traffic.loads == GlobalTraffic(1, 8, 8, 8)
    assert traffic.stores == GlobalTraffic(1, 16, 16, 16)


def test_threads_that_leave_out_iterations_stay_together(count):
    """Every thread leaves out another quarter of the loop."""
    body = """
  for (int i = 0; i < 8; ++i) {
    if (i % 4 != threadIdx.x % 4) out[32 * i + threadIdx.x] = x[32 * i + threadIdx.x];
  }
"""
    traffic, _ = count(body)
    assert traffic.loads == traffic.stores == GlobalTraffic(8, 8 * 4, 8 * 3, 8 * 4)


def test_some_blocks_stand_for_all(count):
    body = "out[32 * blockIdx.x + threadIdx.x] = blockIdx.x + 1;"
    traffic, out = count(body, blocks=96, most_blocks=8)
    assert (traffic.blocks, traffic.counted_blocks) == (96, 8)
    assert traffic.stores == GlobalTraffic(96, 4 * 96, 4 * 96, 4 * 96)
    run = np.flatnonzero(out[::32])
    assert run[0] == 0
    assert list(run // 12) == list(range(8))
    assert len(set(run % 12)) > 4


COLUMN = """
  __shared__ alignas(64) float tile[32 * %(row)d];
  for (int i = 0; i < 32; ++i) {
    tile[%(row)d * i + threadIdx.x] = x[32 * i + threadIdx.x];
  }
  __syncthreads();
  for (int i = 0; i < 32; ++i) {
    out[32 * i + threadIdx.x] = tile[%(row)d * threadIdx.x + i];
  }
"""


@pytest.mark.parametrize(("row", "ways"), [(32, 32), (33, 1), (34, 2)])
def test_a_tile_read_by_columns(count, row, ways):
    x = np.arange(4096)
    traffic, out = count(COLUMN % {"row": row}, x)
    assert traffic.shared_stores == SharedTraffic(32, 32, 32)
    assert traffic.shared_loads == SharedTraffic(32, 32 * ways, 32)
    np.testing.assert_array_equal(out[:1024].reshape(32, 32), x[:1024].reshape(32, 32).T)


def test_wide_accesses_to_shared_memory_are_served_in_parts(count):
    body = """
  __shared__ alignas(64) float tile[256];
  *(float4 *)(tile + 4 * threadIdx.x) = *(float4 *)(x + 4 * threadIdx.x);
  *(float2 *)(tile + 128 + 2 * threadIdx.x) = *(float2 *)(x + 2 * threadIdx.x);
  __syncthreads();
  *(float2 *)(out + 2 * threadIdx.x) = *(float2 *)(tile + 4 * threadIdx.x);
  out[64 + threadIdx.x] = tile[128];
"""
    traffic, _ = count(body)
    assert traffic.shared_stores == SharedTraffic(2, 4 + 2, 4 + 2)
    # Threads of a half of the warp lie two words apart; what all read is one word.
    assert traffic.shared_loads == SharedTraffic(2, 2 * 2 + 1, 2 + 1)


def test_wide_reads_of_the_same_are_served_together(count):
    """All threads one vector; neighbours one; every second one; halves of the warp the same."""
    body = """
  __shared__ alignas(64) float4 tile[32];
  tile[threadIdx.x] = *(float4 *)(x + 4 * threadIdx.x);
  __syncthreads();
  *(float4 *)(out + 4 * threadIdx.x) = tile[%s];
"""
    places = ("5", "threadIdx.x / 2", "threadIdx.x / 4 * 2 + threadIdx.x % 2", "threadIdx.x % 16")
    found = [count(body % place)[0].shared_loads for place in places]
    assert [loads.wavefronts for loads in found] == [2, 2, 2, 4]
    assert all(loads.wavefronts == loads.least_wavefronts for loads in found)


COPIED = """
  extern __shared__ __align__(64) uchar buffer[];
  half *tile = (half *)buffer;
  unsigned a, b, c, d;
  for (int i = 0; i < 4; ++i) {
    unsigned to = __cvta_generic_to_shared(tile + %(row)d * (4 * i + threadIdx.x / 8)
                                           + 8 * (threadIdx.x %% 8));
    half *from = (half *)x + 64 * (4 * i + threadIdx.x / 8) + 8 * (threadIdx.x %% 8);
    asm volatile("cp.async.cg.shared.global [%%0], [%%1], %%2;" :: "r"(to), "l"(from), "n"(16));
  }
  asm volatile("cp.async.commit_group;" : : );
  asm volatile("cp.async.wait_group 0;" : : : "memory");
  __syncthreads();
  unsigned at = __cvta_generic_to_shared(tile + %(row)d * (threadIdx.x %% 16)
                                         + 8 * (threadIdx.x / 16));
  __asm__ __volatile__(
    "ldmatrix.sync.aligned.m8n8.x4.shared.b16"
    "{%%0, %%1, %%2, %%3}, [%%4];"
    : "=r"(a), "=r"(b), "=r"(c), "=r"(d)
    : "r"(at)
  );
  ((unsigned *)out)[threadIdx.x] = a;
"""


@pytest.mark.parametrize(("row", "ways"), [(64, 8), (72, 1)])
def test_copies_and_matrices(count, row, ways):
    """Rows of 64 halves begin in the same bank, unless 16 bytes lie between them."""
    traffic, out = count(COPIED % {"row": row}, np.arange(4096))
    assert traffic.loads == GlobalTraffic(4, 64, 64, 64)
    assert traffic.copied_sectors == 64
    assert traffic.shared_stores == SharedTraffic(4, 16, 16)
    assert traffic.shared_loads == SharedTraffic(1, 4 * ways, 4)
    # The first matrix: a thread has two neighbours of a row, which are a float here.
    lane = np.arange(32)
    np.testing.assert_array_equal(out[:32], lane // 4 * 32 + lane % 4)


def test_nothing_is_counted_unless_asked_for(kernel, monkeypatch):
    monkeypatch.delenv(COUNTING, raising=False)
    assert not hasattr(kernel("out[0] = x[0];", 32).library, "emulated_traffic")
    with pytest.raises(ValueError, match="no launch was counted"):
        traffic_of("launch k\n")


def half(rng, *shape):
    return rng.standard_normal(shape).astype("float16")


@pytest.fixture(scope="module")
def rule_traffic(gpu):
    """One kernel of each rule, with the bytes of its arguments."""
    rng, space = np.random.default_rng(7), SearchSpace()
    floats = np.ones(64, "float32")
    spec = dataclasses.replace(
        DCNv3Spec.of((2, 14, 14, 64), group=4, dtype="float16"), softmax=True
    )
    image = half(rng, 2, 14, 14, 64)
    functions = {
        "gemm": tensorize.tensorize(
            products.gemm(
                gemm.linear((392,), 64, 128, epilogue=Epilogue(), dtype="float16"), TARGET, space
            )
        ),
        "layer_norm": layer_norm_kernel(
            layer_norm_kernel((2, 14, 14), 64, eps=1e-6, x_dtype="float16", out_dtype="float16"),
            TARGET,
            space,
        ),
        "depthwise": depthwise.depthwise(
            depthwise_kernel(
                *(2, 14, 14, 64),
                kernel_size=(3, 3),
                stride=(1, 1),
                pad=(1, 1),
                bias=True,
                norm_eps=1e-6,
                activation="gelu",
                x_dtype="float16",
                out_dtype="float16",
            ),
            TARGET,
            space,
        ),
        "dcnv3": sampling.dcnv3(tensorir.dcnv3_packed(spec), TARGET, space),
    }
    weight = np.ones((3, 3, 64), "float32")
    inputs = {
        "gemm": [image.reshape(392, 64), gemm.pack(half(rng, 128, 64))],
        "layer_norm": [image, floats, floats],
        "depthwise": [image, weight, floats, floats, floats],
        "dcnv3": operator.arguments(spec, random_inputs(spec, seed=0), packed=True),
    }
    shapes = dict.fromkeys(inputs, (2, 14, 14, 64)) | {"gemm": (392, 128)}
    arguments = {name: (inputs[name], [(shapes[name], "float16")]) for name in inputs}
    traffic = gpu.traffic(functions, TARGET, arguments, most_blocks=1000)
    read = {name: sum(array.nbytes for array in arrays) for name, arrays in inputs.items()}
    return {name: (traffic[name], read[name], 2 * np.prod(shapes[name])) for name in inputs}


@pytest.mark.parametrize("name", ["gemm", "layer_norm", "depthwise"])
def test_rules_write_whole_sectors_once(rule_traffic, name):
    traffic, read, written = rule_traffic[name]
    assert traffic.counted_blocks == traffic.blocks
    assert SECTOR * traffic.stores.sectors == written
    assert traffic.stores.sectors == traffic.stores.least_sectors == traffic.stores.block_sectors
    assert SECTOR * traffic.loads.block_sectors >= read
    assert traffic.loads.least_sectors <= traffic.loads.sectors
    assert traffic.wavefronts >= traffic.least_wavefronts


def test_products_are_those_of_the_filled_tiles(rule_traffic):
    traffic, read, _ = rule_traffic["gemm"]
    least = 2 * 392 * 64 * 128 / PRODUCT_FLOPS
    assert least <= traffic.products <= 2 * least
    assert 0 < traffic.copied_sectors == traffic.loads.sectors
    assert SECTOR * traffic.loads.sectors <= 16 * read
    assert traffic.least_wavefronts > 0


def test_other_rules_use_no_tensor_cores(rule_traffic):
    assert not any(rule_traffic[name][0].products for name in ("layer_norm", "depthwise", "dcnv3"))


def test_a_window_is_read_no_more_than_its_size(rule_traffic):
    traffic, read, _ = rule_traffic["depthwise"]
    assert SECTOR * traffic.loads.block_sectors <= 9 * read


def test_sampling_writes_all_and_reads_a_block_s_surroundings(rule_traffic):
    traffic, read, written = rule_traffic["dcnv3"]
    assert SECTOR * traffic.stores.block_sectors == written
    # The four corners of nine samples would be 36 times the input.
    assert read / 2 <= SECTOR * traffic.loads.block_sectors <= 36 * read
    assert traffic.loads.efficiency <= 1
