"""The search space, and that every decision computes the same result."""

import contextlib
import random

import numpy as np
import pytest
import tvm

from dcnv3_tvm import schedules
from dcnv3_tvm.compiler.kernel_library import ENTRY
from dcnv3_tvm.kernels.convolution import convolution
from dcnv3_tvm.kernels.depthwise import depthwise as depthwise_kernel
from dcnv3_tvm.kernels.epilogue import Epilogue
from dcnv3_tvm.kernels.layer_norm import layer_norm as layer_norm_kernel
from dcnv3_tvm.kernels.matmul import matmul
from dcnv3_tvm.op import tensorir
from dcnv3_tvm.op.expr import static
from dcnv3_tvm.schedules.gpu.tensorize import tensorize
from dcnv3_tvm.schedules.space import DecisionError, SearchSpace
from dcnv3_tvm.spec import DCNv3Spec
from dcnv3_tvm.targets import resolve_target
from helpers.gpu_kernels import depthwise as gpu_depthwise
from helpers.gpu_kernels import gemm, mlp

GPU = resolve_target("cuda-sm90")


def test_pick_returns_given_value_or_default():
    space = SearchSpace({"rows": 3})
    assert space.pick("rows", [1, 2, 3], 2) == 3
    assert space.pick("order", ["a", "b"], "b") == "b"
    assert space.candidates == {"rows": (2, 1, 3), "order": ("b", "a")}
    space.check_all_used()


def test_default_need_not_be_a_candidate():
    space = SearchSpace()
    assert space.pick("rows", [4, 8], 5) == 5
    assert space.candidates == {"rows": (5, 4, 8)}


def test_rejects_unsupported_decisions():
    with pytest.raises(DecisionError, match=r"value of rows; got 5; allowed: 2, 1, 3"):
        SearchSpace({"rows": 5}).pick("rows", [1, 2, 3], 2)
    space = SearchSpace({"columns": 5})
    space.pick("rows", [1], 1)
    with pytest.raises(DecisionError, match=r"no such decision; got columns; allowed: rows"):
        space.check_all_used()


SPEC = DCNv3Spec.of((2, 7, 9, 64), group=4, softmax=True)

CPU_KERNELS = {
    "matmul": matmul((3, 13), 24, 64, tile=32, epilogue=Epilogue(bias=True)),
    "matmul_slack": matmul((47,), 24, 75, tile=32, row_slack=15),
    "matmul_residual": matmul(
        (4, 14), 64, 40, tile=32, epilogue=Epilogue(bias=True, residual=True)
    ),
    "convolution": convolution(
        1, 15, 29, 8, 40, kernel_size=(3, 3), stride=(2, 2), pad=(1, 1), tile=32
    ),
    "convolution_whole": convolution(
        2, 12, 17, 8, 64, kernel_size=(3, 3), stride=(1, 1), pad=(1, 1), tile=32, row_slack=15
    ),
    "depthwise": depthwise_kernel(
        1, 9, 14, 96, kernel_size=(3, 3), pad=(1, 1), bias=True, norm_eps=1e-6, activation="gelu"
    ),
    "layer_norm": layer_norm_kernel((36,), 48, eps=1e-6),
    "dcnv3": tensorir.dcnv3(SPEC),
    "dcnv3_packed": tensorir.dcnv3_packed(SPEC),
}

GPU_KERNELS = {
    "gemm_half": gemm((70,), 96, 128, epilogue=Epilogue(bias=True), dtype="float16"),
    "gemm": gemm((70,), 48, 64, epilogue=Epilogue(bias=True, residual=True), dtype="float32"),
    "mlp": mlp((150,), 48, 96, 48, activation="gelu", residual=True, dtype="float16"),
    "depthwise": gpu_depthwise(
        1, 9, 14, 96, kernel_size=(3, 3), pad=(1, 1), bias=True, norm_eps=1e-6, activation="gelu"
    ),
    "layer_norm": layer_norm_kernel((37,), 96, eps=1e-6),
    "dcnv3": tensorir.dcnv3(SPEC, vector_loads=True),
}


def arguments_of(func, rng):
    arrays = [
        rng.standard_normal([static(size) for size in buffer.shape]).astype(str(buffer.dtype))
        for buffer in func.params
    ]
    arrays[-1][...] = np.nan
    return arrays


def run(func, arrays):
    module = tvm.IRModule({ENTRY: func.with_attr("global_symbol", ENTRY)})
    tensors = [tvm.runtime.tensor(array) for array in arrays]
    tvm.compile(module, target=resolve_target())[ENTRY](*tensors)
    return tensors[-1].numpy()


def sample_decisions(space, count, seed):
    """Draw each decision uniformly from its candidates."""
    chance = random.Random(seed)
    return [
        {decision: chance.choice(values) for decision, values in space.items()}
        for _ in range(count)
    ]


@pytest.mark.parametrize("name", CPU_KERNELS)
def test_cpu_decisions_compute_the_same(name, rng, assert_close):
    func, target = CPU_KERNELS[name], resolve_target()
    arrays = arguments_of(func, rng)
    expected = run(func, arrays)
    assert np.isfinite(expected).all()
    space = schedules.schedule(func, target).space
    assert space
    for decisions in sample_decisions(space, 4, seed=name):
        found = schedules.schedule(func, target, decisions)
        assert_close(run(found.function, arrays), expected)


@pytest.mark.parametrize("name", GPU_KERNELS)
def test_gpu_decisions_compute_the_same(name, gpu, rng, assert_close):
    func = GPU_KERNELS[name]
    arrays = arguments_of(func, rng)
    expected = run(func, arrays)
    space = schedules.schedule(func, GPU).space
    scheduled = {}
    for number, decisions in enumerate(sample_decisions(space, 24, seed=name)):
        with contextlib.suppress(DecisionError):
            found = schedules.schedule(func, GPU, decisions)
            scheduled[f"kernel{number}"] = tensorize(found.function)
            if len(scheduled) == 3:
                break
    assert len(scheduled) >= 2
    dtype = str(expected.dtype)
    cases = dict.fromkeys(scheduled, (arrays[:-1], [(expected.shape, dtype)]))
    for (result,) in gpu.run_all(scheduled, GPU, cases).values():
        assert_close(result, expected, dtype)


def test_rejects_blocks_with_too_many_threads():
    func = layer_norm_kernel((256,), 1024, eps=1e-6)
    space = schedules.schedule(func, GPU).space
    assert 128 in space["rows"]
    assert 32 in space["lanes"]
    with pytest.raises(DecisionError, match="too many threads; got 4096; allowed: up to 1024"):
        schedules.schedule(func, GPU, {"rows": 128, "lanes": 32})


def test_rejects_tiles_that_exceed_shared_memory():
    small = resolve_target("cuda-sm86")
    func = gemm((1024,), 256, 128, dtype="float16")
    large = {"warp_rows": 4, "rows": 4, "warp_columns": 1, "columns": 8, "depth": 4, "stages": 4}
    with pytest.raises(
        DecisionError, match=r"too much shared memory; got \d+ bytes; allowed: up to"
    ):
        schedules.schedule(func, small, large)


def test_rejects_decisions_of_another_rule():
    func = CPU_KERNELS["layer_norm"]
    with pytest.raises(DecisionError, match="no such decision; got task"):
        schedules.schedule(func, resolve_target(), {"task": "row"})


def test_few_rows_only_allow_pixels_as_tasks():
    func = tensorir.dcnv3(DCNv3Spec.of((1, 14, 14, 32), group=2))
    few = resolve_target("llvm -mcpu=znver4 -num-cores=2")
    many = resolve_target("llvm -mcpu=znver4 -num-cores=64")
    assert schedules.schedule(func, few, {"task": "row"}).space["task"] == ("row", "pixel")
    with pytest.raises(DecisionError, match="value of task; got row; allowed: pixel"):
        schedules.schedule(func, many, {"task": "row"})
