import numpy as np
import pytest
from tvm import relax, s_tir

from dcnv3_tvm import gpu
from dcnv3_tvm.schedules import choose_run
from dcnv3_tvm.transform.lower_gpu import lower_gpu
from helpers.arrays import random_array
from helpers.programs import kernel_types, make_program, operators, run_program


def _block(bb, x, skip, first, second, bias):
    """Matmul and GELU; a matmul added to a residual stream; a matmul that reads the stream."""
    hidden = bb.emit(relax.op.nn.gelu(bb.emit(relax.op.matmul(x, first))))
    value = bb.emit(relax.op.add(bb.emit(relax.op.matmul(hidden, second)), bias))
    stream = bb.emit(relax.op.add(skip, value))
    return bb.emit(relax.op.matmul(stream, first))


def _program(rng):
    weights = {
        "first": random_array(rng, 16, 48),
        "second": random_array(rng, 48, 16),
        "bias": random_array(rng, 16),
    }
    return make_program(_block, {"x": (5, 16), "skip": (5, 16)}, weights)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_lowering_preserves_the_results(dtype, rng):
    program = _program(rng)
    inputs = random_array(rng, 5, 16), random_array(rng, 5, 16)
    lowered = lower_gpu(program, choose_run, dtype)
    relax.analysis.well_formed(lowered.module)
    expected, result = run_program(program, *inputs), run_program(lowered, *inputs)
    error = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 1e-2}[dtype]
    assert result.dtype == np.float32
    assert np.linalg.norm(result - expected) <= error * np.linalg.norm(expected)


@pytest.mark.parametrize(("dtype", "stream"), [("float16", "float16"), ("bfloat16", "float32")])
def test_storagekernel_types(dtype, stream, rng):
    lowered = lower_gpu(_program(rng), choose_run, dtype)
    assert kernel_types(lowered) == {
        # x, weight, out: inputs and outputs of a model are float32.
        "matmul_16_48_gelu": ["float32", dtype, dtype],
        "matmul_48_16_residual": [dtype, dtype, "float32", "float32", stream],
        "matmul_16_48": [stream, dtype, "float32"],
    }


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("used_twice", [False, True])
def test_two_matmuls_become_one_kernel(dtype, used_twice, rng, monkeypatch):
    monkeypatch.setattr(gpu, "FULL_GPU_BLOCKS", 0)  # few rows are enough

    def build(bb, x, first, bias1, second, bias2):
        inner = bb.emit(relax.op.add(bb.emit(relax.op.matmul(x, first)), bias1))
        hidden = bb.emit(relax.op.nn.gelu(inner))
        result = bb.emit(relax.op.add(bb.emit(relax.op.matmul(hidden, second)), bias2))
        result = bb.emit(relax.op.add(x, result))
        return bb.emit(relax.op.concat([result, hidden], axis=-1)) if used_twice else result

    weights = {
        "first": random_array(rng, 16, 64) / 4,
        "bias1": random_array(rng, 64),
        "second": random_array(rng, 64, 16) / 8,
        "bias2": random_array(rng, 16),
    }
    program = make_program(build, {"x": (3, 5, 16)}, weights)
    lowered = lower_gpu(program, choose_run, dtype)
    relax.analysis.well_formed(lowered.module)
    x = random_array(rng, 3, 5, 16)
    expected, result = run_program(program, x), run_program(lowered, x)
    error = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 1e-2}[dtype]
    assert np.linalg.norm(result - expected) <= error * np.linalg.norm(expected)
    fused = not used_twice and dtype != "float32"
    assert ("mlp_16_64_16_residual" in operators(lowered)) == fused


def test_operators_without_a_kernel_read_float32(rng):
    def build(bb, x, weight):
        value = bb.emit(relax.op.matmul(x, weight))
        return bb.emit(relax.op.mean(bb.emit(relax.op.exp(value)), axis=[1]))

    program = make_program(build, {"x": (4, 16)}, {"weight": random_array(rng, 16, 16) / 8})
    lowered = lower_gpu(program, choose_run, "float16")
    assert operators(lowered) == ["matmul_16_16", "relax.astype", "relax.exp", "relax.mean"]
    x = random_array(rng, 4, 16)
    np.testing.assert_allclose(run_program(lowered, x), run_program(program, x), rtol=4e-3)


@pytest.mark.parametrize("run", [None, 4])
def test_depthwise_kernel_has_the_chosen_run(run, rng):
    def build(bb, x, weight):
        layouts = {"data_layout": "NHWC", "kernel_layout": "OHWI", "out_layout": "NHWC"}
        return bb.emit(relax.op.nn.conv2d(x, weight, padding=1, groups=16, **layouts))

    program = make_program(build, {"x": (1, 5, 7, 16)}, {"weight": random_array(rng, 16, 3, 3, 1)})
    lowered = lower_gpu(program, lambda _kernel: run, "float16")
    schedule = s_tir.Schedule(lowered.module["depthwise_16"])
    (sums,) = schedule.get(schedule.get_sblock("window")).writes
    pixels = [7] if run is None else [2, run]
    assert list(sums.source.shape) == [1, 5, *pixels, 16]
