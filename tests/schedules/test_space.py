"""What rules ask, and that every answer computes the same."""

import contextlib
import random

import numpy as np
import pytest
import tvm

from dcnv3_tvm import schedules
from dcnv3_tvm.compiler.kernel_listing import ENTRY
from dcnv3_tvm.kernels.convolution import convolution
from dcnv3_tvm.kernels.depthwise import depthwise as depthwise_kernel
from dcnv3_tvm.kernels.epilogue import Epilogue
from dcnv3_tvm.kernels.gemm import gemm
from dcnv3_tvm.kernels.layer_norm import layer_norm as layer_norm_kernel
from dcnv3_tvm.kernels.matmul import matmul
from dcnv3_tvm.kernels.mlp import mlp
from dcnv3_tvm.op import tensorir
from dcnv3_tvm.op.expr import static
from dcnv3_tvm.schedules.gpu.tensorize import tensorize
from dcnv3_tvm.schedules.space import DecisionError, SearchSpace
from dcnv3_tvm.spec import DCNv3Spec
from dcnv3_tvm.targets import resolve_target

GPU = resolve_target("cuda-sm90")


def test_defaults_and_what_was_given():
    space = SearchSpace({"rows": 3})
    assert space.pick("rows", [1, 2, 3], 2) == 3
    assert space.pick("order", ["a", "b"], "b") == "b"
    assert space.candidates == {"rows": (2, 1, 3), "order": ("b", "a")}
    space.check_all_asked()


def test_a_default_need_not_be_a_candidate():
    space = SearchSpace()
    assert space.pick("rows", [4, 8], 5) == 5
    assert space.candidates == {"rows": (5, 4, 8)}


def test_values_that_cannot_be_are_refused():
    with pytest.raises(DecisionError, match=r"this rows; got 5; allowed: 2, 1, 3"):
        SearchSpace({"rows": 5}).pick("rows", [1, 2, 3], 2)
    space = SearchSpace({"columns": 5})
    space.pick("rows", [1], 1)
    with pytest.raises(DecisionError, match=r"no such decision; got columns; allowed: rows"):
        space.check_all_asked()


SPEC = DCNv3Spec.of((2, 7, 9, 64), group=4, softmax=True)

CPU_KERNELS = {
    "matmul": matmul((3, 13), 24, 64, tile=32, epilogue=Epilogue(bias=True)),
    "matmul_slack": matmul((47,), 24, 75, tile=32),
    "matmul_residual": matmul(
        (4, 14), 64, 40, tile=32, epilogue=Epilogue(bias=True, residual=True)
    ),
    "convolution": convolution(
        1, 15, 29, 8, 40, kernel_size=(3, 3), stride=(2, 2), pad=(1, 1), tile=32
    ),
    "convolution_whole": convolution(
        2, 12, 17, 8, 64, kernel_size=(3, 3), stride=(1, 1), pad=(1, 1), tile=32
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
    "depthwise": depthwise_kernel(
        1, 9, 14, 96, kernel_size=(3, 3), pad=(1, 1), bias=True, norm_eps=1e-6, activation="gelu"
    ),
    "layer_norm": layer_norm_kernel((37,), 96, eps=1e-6),
    "dcnv3": tensorir.dcnv3(SPEC),
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


def some_decisions(space, count, name):
    """Draw decisions, each value of each decision about as often as the others."""
    chance = random.Random(name)
    return [
        {decision: chance.choice(values) for decision, values in space.items()}
        for _ in range(count)
    ]


@pytest.mark.parametrize("name", CPU_KERNELS)
def test_every_decision_of_a_processors_schedule_computes_the_same(name, rng, assert_close):
    func, target = CPU_KERNELS[name], resolve_target()
    arrays = arguments_of(func, rng)
    truth = run(func, arrays)
    assert np.isfinite(truth).all()
    space = schedules.schedule(func, target).space
    assert space
    for decisions in some_decisions(space, 6, name):
        found = schedules.schedule(func, target, decisions)
        assert_close(run(found.function, arrays), truth)


@pytest.mark.parametrize("name", GPU_KERNELS)
def test_every_decision_of_a_gpus_schedule_computes_the_same(name, gpu, rng, assert_close):
    func = GPU_KERNELS[name]
    arrays = arguments_of(func, rng)
    truth = run(func, arrays)
    space = schedules.schedule(func, GPU).space
    scheduled = {}
    for number, decisions in enumerate(some_decisions(space, 24, name)):
        with contextlib.suppress(DecisionError):
            found = schedules.schedule(func, GPU, decisions)
            scheduled[f"kernel{number}"] = tensorize(found.function)
            if len(scheduled) == 5:
                break
    assert len(scheduled) >= 2
    dtype = str(truth.dtype)
    cases = dict.fromkeys(scheduled, (arrays[:-1], [(truth.shape, dtype)]))
    for (result,) in gpu.run_all(scheduled, GPU, cases).values():
        assert_close(result, truth, dtype)


def test_a_schedule_with_too_many_threads_is_refused():
    func = layer_norm_kernel((256,), 1024, eps=1e-6)
    space = schedules.schedule(func, GPU).space
    assert 128 in space["rows"]
    assert 32 in space["lanes"]
    with pytest.raises(DecisionError, match="too many threads; got 4096; allowed: up to 1024"):
        schedules.schedule(func, GPU, {"rows": 128, "lanes": 32})


def test_a_tile_that_does_not_fit_shared_memory_is_refused():
    small = resolve_target("cuda-sm86")
    func = gemm((1024,), 256, 128, dtype="float16")
    large = {"warp_rows": 4, "rows": 4, "warp_columns": 1, "columns": 8, "depth": 4, "stages": 4}
    with pytest.raises(
        DecisionError, match=r"too much shared memory; got \d+ bytes; allowed: up to"
    ):
        schedules.schedule(func, small, large)


def test_decisions_for_another_rule_are_refused():
    func = CPU_KERNELS["layer_norm"]
    with pytest.raises(DecisionError, match="no such decision; got task"):
        schedules.schedule(func, resolve_target(), {"task": "row"})


def test_pixels_are_the_only_tasks_where_rows_are_too_few_for_the_cores():
    func = tensorir.dcnv3(DCNv3Spec.of((1, 14, 14, 32), group=2))
    few = resolve_target("llvm -mcpu=znver4 -num-cores=2")
    many = resolve_target("llvm -mcpu=znver4 -num-cores=64")
    assert schedules.schedule(func, few, {"task": "row"}).space["task"] == ("row", "pixel")
    with pytest.raises(DecisionError, match="this task; got row; allowed: pixel"):
        schedules.schedule(func, many, {"task": "row"})
