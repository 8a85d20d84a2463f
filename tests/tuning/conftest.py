import dataclasses
import functools

import pytest

from dcnv3_tvm.compiler.kernel_listing import Tensor
from dcnv3_tvm.kernels.matmul import matmul
from dcnv3_tvm.targets import resolve_target
from dcnv3_tvm.tuning.devices import Devices
from dcnv3_tvm.tuning.laboratory import Laboratory
from dcnv3_tvm.tuning.session import Budget, Session, Setting
from dcnv3_tvm.tuning.tasks import Task
from helpers.simulated_device import SimulatedPlace


@pytest.fixture(scope="session")
def target():
    return resolve_target()


@pytest.fixture(scope="session")
def tasks(target):
    """Two kernels that compile in no time, with twelve schedules each."""
    found = []
    for rows in (7, 11):
        function = matmul((rows,), 1, 16, tile=16)
        shapes = ((rows, 1), (1, 1, 16), (rows, 16))
        arguments = tuple(Tensor(shape, "float32") for shape in shapes)
        found.append(Task.of(function, arguments, 1, target))
    assert [task.size for task in found] == [12, 12]
    return found


@pytest.fixture
def simulated(target, tmp_path):
    """Make a laboratory whose devices are not real."""

    def make(*, count=1, retries=0, timeout=20.0, **options):
        place = SimulatedPlace(log=tmp_path / "measurements", **options)
        devices = Devices(place, count, True, retries > 0, retries, "simulated")
        return Laboratory(target, devices, builders=2, timeout=timeout)

    return make


@pytest.fixture
def session(tasks, target, tmp_path):
    """Make a session in one work directory."""

    def make(trials, **options):
        setting = Setting.of(target, hardware="simulated", cores=1)
        if "hardware" in options:
            setting = dataclasses.replace(setting, hardware=options.pop("hardware"))
        return Session(tmp_path / "work", tasks, setting, Budget(trials), **options)

    return make


@pytest.fixture
def lines(tmp_path):
    """Return the lines of the session's list of trials."""
    return functools.partial(
        lambda path: path.read_text().splitlines(), tmp_path / "work" / "trials.jsonl"
    )
