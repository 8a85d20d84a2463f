"""Build, time and check kernels on this machine."""

import dataclasses
import functools

import pytest
from tvm import te

from dcnv3_tvm import machine
from dcnv3_tvm.compiler.kernel_library import export_kernel
from dcnv3_tvm.compiler.kernel_listing import KernelArgument
from dcnv3_tvm.kernels.matmul import matmul
from dcnv3_tvm.op import tensorir
from dcnv3_tvm.schedules.records import workload_key
from dcnv3_tvm.spec import DCNv3Spec
from dcnv3_tvm.tuning.builder import build_candidate
from dcnv3_tvm.tuning.process_pool import ProcessPool
from dcnv3_tvm.tuning.runner import KernelRunner
from dcnv3_tvm.tuning.tasks import list_tasks, operator_task

RUNNER = KernelRunner("cpu", threads=1)


@pytest.fixture(scope="module")
def run():
    """Call a function in another process: the runner binds its process to some cores."""
    with ProcessPool(1, fresh=False) as pool:

        def call(function, *arguments, **options):
            job = functools.partial(function, *arguments, **options)
            ((_, result),) = pool.run([job], timeout=600)
            return result

        yield call


@pytest.fixture(scope="module")
def task(target):
    return operator_task(DCNv3Spec.of((1, 9, 7, 32), group=2), target)


def check(run, path, task):
    return run(RUNNER.check, path, task.arguments, task.outputs, task.reference, timeout=20).value


def test_schedule_is_timed_and_correct(run, task, target, tmp_path):
    path = tmp_path / "kernel.so"
    build_candidate(task.function, target, {"task": "pixel"}, path)
    times = run(RUNNER.measure, path, task.arguments, seconds=0.01, timeout=20).value
    assert len(times) >= 7
    assert min(times) > 0
    assert check(run, path, task) == ""


def test_gradient_kernels_are_tuned_as_training_compiles_them(run, target, tmp_path):
    spec = DCNv3Spec.of((2, 5, 7, 32), group=2)
    tasks = list_tasks([spec], target, "float32", backward=True)
    assert [task.rule for task in tasks] == ["dcnv3", "dcnv3_grad_x", "dcnv3_grad_offset_mask"]
    for task in tasks[1:]:
        compiled = dataclasses.replace(spec, batch=None, height=None)
        kernel = getattr(tensorir, task.rule)(compiled)
        assert task.workload == workload_key(kernel)
        path = tmp_path / f"{task.rule}.so"
        decisions = {name: values[-1] for name, values in task.space.items()}
        build_candidate(task.function, target, decisions, path)
        assert check(run, path, task) == ""


def test_wrong_result_is_detected(run, task, target, tmp_path):
    other = operator_task(DCNv3Spec.of((1, 9, 7, 32), group=2, offset_scale=1.5), target)
    path = tmp_path / "kernel.so"
    build_candidate(other.function, target, other.default, path)
    assert check(run, path, task).startswith("wrong result: error ")


def test_every_output_is_checked(run, target, tmp_path):
    def multiples(first, second):
        x = te.placeholder((5,), name="x")
        y, z = te.compute((5,), lambda i: first * x[i]), te.compute((5,), lambda i: second * x[i])
        return te.create_prim_func([x, y, z])

    arguments = (KernelArgument((5,), "float32"),) * 3
    path = tmp_path / "kernel.so"
    export_kernel(multiples(2.0, 3.0), target, path)
    for factors, message in (((2.0, 3.0), ""), ((2.5, 3.0), "wrong"), ((2.0, 3.5), "wrong")):
        result = run(RUNNER.check, path, arguments, 2, multiples(*factors), timeout=20)
        assert result.value.startswith(message)
        assert bool(result.value) == bool(message)


def test_shape_mismatch_is_detected(run, task, target, tmp_path):
    other = operator_task(DCNv3Spec.of((1, 9, 6, 32), group=2), target)
    assert other.arguments[-1].shape != task.arguments[-1].shape
    path = tmp_path / "kernel.so"
    build_candidate(other.function, target, other.default, path)
    result = run(RUNNER.check, path, task.arguments, task.outputs, task.function, timeout=20)
    assert result.error.startswith(("RuntimeError", "ValueError", "TypeError"))


@pytest.mark.skipif("avx512bf16" not in (machine.cpu_features() or ()), reason="needs avx512_bf16")
def test_bfloat16_matmul_is_correct(run, target, tmp_path):
    function = matmul((5, 7), 32, 64, tile=32, dtype="bfloat16")
    arguments = tuple(
        KernelArgument(tuple(int(size) for size in buffer.shape), str(buffer.dtype))
        for buffer in function.params
    )
    path = tmp_path / "kernel.so"
    build_candidate(function, target, {"rows": 7, "block": 1}, path)
    assert run(RUNNER.measure, path, arguments, seconds=0.001, timeout=20).value
    assert run(RUNNER.check, path, arguments, 1, function, timeout=20).value == ""
