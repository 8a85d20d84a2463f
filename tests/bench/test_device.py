"""The clock, the names and the errors of a GPU, without one."""

import numpy as np
import pytest
import torch

from dcnv3_tvm import gpu
from dcnv3_tvm.bench.contestants import error_of
from dcnv3_tvm.bench.device import Device, driver_version, event_seconds, tensor_error
from dcnv3_tvm.bench.measure import Plan, measure
from dcnv3_tvm.errors import MissingDependencyError, TargetError


class Stream:
    """A GPU whose time passes only while it works, and a host that never waits for it."""

    def __init__(self):
        self.now = 0.0
        self.log = []

    def event(self, name):
        return Event(self, name)

    def work(self, name, milliseconds):
        def call():
            self.log.append(name)
            self.now += milliseconds

        return call


class Event:
    def __init__(self, stream, name):
        self.stream, self.name, self.at = stream, name, None

    def record(self):
        self.stream.log.append(self.name)
        self.at = self.stream.now

    def synchronize(self):
        self.stream.log.append("wait")

    def elapsed_time(self, end):
        return end.at - self.at


def test_time_between_events():
    stream = Stream()
    start, end = stream.event("start"), stream.event("end")
    assert event_seconds(stream.work("call", 3.0), start, end) == pytest.approx(3e-3)
    # The host waits once, when everything is on its way.
    assert stream.log == ["start", "call", "end", "wait"]


def test_the_cache_is_flushed_before_every_call_and_not_timed():
    stream = Stream()
    events = stream.event("start"), stream.event("end")
    found = measure(
        {"a": stream.work("a", 2.0), "b": stream.work("b", 5.0)},
        Plan(rounds=2, calls=3, dropped=1, pause=0.0),
        sleep=lambda _: None,
        before=dict.fromkeys("ab", stream.work("flush", 70.0)),
        seconds_of=lambda call: event_seconds(call, *events),
    )
    assert found["a"].bursts == (pytest.approx((2e-3,) * 2),) * 2
    assert found["b"].bursts == (pytest.approx((5e-3,) * 2),) * 2
    assert stream.log == [
        step
        for name in "abab"
        for _ in range(3)
        for step in ("flush", "start", name, "end", "wait")
    ]


def test_a_machine_without_a_gpu(monkeypatch):
    monkeypatch.setattr(gpu, "devices", lambda: ())
    with pytest.raises(TargetError, match="no NVIDIA GPU"):
        Device()


@pytest.mark.skipif(torch.cuda.is_available(), reason="this PyTorch can use a GPU")
def test_a_pytorch_without_cuda(monkeypatch):
    monkeypatch.setattr(gpu, "devices", lambda: (gpu.GpuInfo(0, "NVIDIA H200", "sm_90", 1, 132),))
    with pytest.raises(MissingDependencyError, match="PyTorch cannot use the GPU"):
        Device()


def test_driver_version(tmp_path):
    path = tmp_path / "version"
    path.write_text(
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  570.124.06  Wed Feb 26\nGCC 12"
    )
    assert driver_version(path) == "570.124.06"
    path.write_text("nothing")
    assert driver_version(path) is None
    assert driver_version(tmp_path / "none") is None


@pytest.mark.parametrize("measure_error", ["max", "norm"])
def test_errors_are_those_of_arrays(measure_error):
    rng = np.random.default_rng(0)
    truth = [rng.standard_normal((19, 3, 5)), rng.standard_normal((2, 7))]
    found = [array + 1e-3 * rng.standard_normal(array.shape) for array in truth]

    def both(outputs):
        tensors = [list(map(torch.from_numpy, arrays)) for arrays in (outputs, truth)]
        return tensor_error(*tensors, measure_error), error_of(outputs, truth, measure_error)

    mine, theirs = both(found)
    assert mine == pytest.approx(theirs)
    assert mine > 1e-4
    lost = [found[0].copy(), found[1]]
    lost[0][17, 1, 1] = np.nan
    for wrong in (lost, found[:1], [found[0].transpose(0, 2, 1), found[1]]):
        assert np.isnan(both(wrong)).all()
