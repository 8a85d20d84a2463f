import itertools
import json

import pytest

from dcnv3_tvm.compiler.kernel_listing import KernelArgument
from dcnv3_tvm.kernels.matmul import matmul
from dcnv3_tvm.targets import resolve_target
from dcnv3_tvm.tuning import measurer
from dcnv3_tvm.tuning.context import MeasurementContext
from dcnv3_tvm.tuning.device_pool import DevicePool
from dcnv3_tvm.tuning.measurer import Measurer
from dcnv3_tvm.tuning.session import TuningBudget, TuningSession
from dcnv3_tvm.tuning.tasks import TuningTask
from helpers.simulated_runner import SimulatedRunner, build_nothing


@pytest.fixture(scope="session")
def target():
    return resolve_target()


@pytest.fixture(scope="session")
def tasks(target):
    """Two kernels with twelve schedules each."""
    tasks = []
    for rows in (7, 11):
        function = matmul((rows,), 1, 16, tile=16)
        shapes = ((rows, 1), (1, 1, 16), (rows, 16))
        arguments = tuple(KernelArgument(shape, "float32") for shape in shapes)
        tasks.append(TuningTask.of(function, arguments, 1, target))
    assert [task.size for task in tasks] == [12, 12]
    return tasks


@pytest.fixture
def simulated(target, tmp_path, monkeypatch):
    """Create a measurer that builds nothing and measures on simulated devices."""
    monkeypatch.setattr(measurer, "build_candidate", build_nothing)

    def create(*, size=1, retries=0, timeout=600.0, **options):
        devices = DevicePool(
            SimulatedRunner(log=tmp_path / "measurements", **options),
            hardware="simulated",
            size=size,
            fresh_processes=False,
            overlap_builds=retries > 0,
            retries=retries,
        )
        return Measurer(target, devices, builders=1, timeout=timeout)

    return create


@pytest.fixture
def session(tasks, target, tmp_path):
    """Create a session in the test's work directory, with a clock that ticks when it is read."""

    def create(trials, *, hardware="simulated", minutes=None, **options):
        options.setdefault("clock", itertools.count().__next__)
        return TuningSession(
            tmp_path / "work",
            tasks,
            MeasurementContext.of(target, hardware=hardware, cores=1),
            TuningBudget(trials, minutes),
            **options,
        )

    return create


@pytest.fixture
def logged_trials(tmp_path):
    """Read the trial log of the test's work directory."""

    def read():
        return [json.loads(line) for line in (tmp_path / "work" / "trials.jsonl").open()]

    return read
