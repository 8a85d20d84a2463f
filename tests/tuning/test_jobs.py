"""Kernels compiled, timed and held against the truth on this machine."""

import pytest

from dcnv3_tvm import machine
from dcnv3_tvm.compiler.kernel_listing import Tensor
from dcnv3_tvm.kernels.matmul import matmul
from dcnv3_tvm.spec import DCNv3Spec
from dcnv3_tvm.targets import resolve_target
from dcnv3_tvm.tuning import jobs
from dcnv3_tvm.tuning.tasks import operator_task

HERE = jobs.Place("cpu", threads=1)


@pytest.fixture(scope="module")
def task(target):
    return operator_task(DCNv3Spec.of((1, 9, 7, 32), group=2), target)


def test_a_schedule_is_compiled_timed_and_right(task, target, tmp_path):
    path = tmp_path / "kernel.so"
    jobs.build(task.function, target, {"task": "pixel"}, path)
    times = HERE.measure(path, task.arguments, seconds=0.01, timeout=20)
    assert len(times) >= 7
    assert min(times) > 0
    assert HERE.compare(path, task.arguments, task.function, timeout=20) == ""


def test_a_kernel_that_computes_something_else_is_found(task, target, tmp_path):
    other = operator_task(DCNv3Spec.of((1, 9, 7, 32), group=2, offset_scale=1.5), target)
    path = tmp_path / "kernel.so"
    jobs.build(other.function, target, other.default, path)
    problem = HERE.compare(path, task.arguments, task.function, timeout=20)
    assert problem.startswith("its result is off by ")


def test_a_kernel_that_writes_nothing_is_found(task, target, tmp_path):
    shape = task.arguments[-1].shape
    half = operator_task(DCNv3Spec.of((1, 9, 6, 32), group=2), target)
    assert half.arguments[-1].shape != shape
    path = tmp_path / "kernel.so"
    jobs.build(half.function, target, half.default, path)
    with pytest.raises((RuntimeError, ValueError, TypeError)):
        HERE.compare(path, task.arguments, task.function, timeout=20)


@pytest.mark.skipif("avx512bf16" not in (machine.cpu_features() or ()), reason="needs avx512_bf16")
def test_products_of_bfloat16(tmp_path):
    target = resolve_target()
    function = matmul((5, 7), 32, 64, tile=32, dtype="bfloat16")
    arguments = tuple(
        Tensor(tuple(int(size) for size in buffer.shape), str(buffer.dtype))
        for buffer in function.params
    )
    path = tmp_path / "kernel.so"
    jobs.build(function, target, {"rows": 7, "block": 1}, path)
    assert HERE.measure(path, arguments, seconds=0.001, timeout=20)
    assert HERE.compare(path, arguments, function, timeout=20) == ""
