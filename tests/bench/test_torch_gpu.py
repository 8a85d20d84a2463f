"""Event timing, driver version and errors, without a GPU."""

import pytest
import torch

from dcnv3_tvm import gpu
from dcnv3_tvm.bench.measure import Plan, measure
from dcnv3_tvm.bench.torch_gpu import TorchGpu, event_seconds, read_driver_version
from dcnv3_tvm.errors import MissingDependencyError, TargetError


class Stream:
    """A stream whose time passes only during work, and a host that never waits for it."""

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
    # The host waits once, after everything is launched.
    assert stream.log == ["start", "call", "end", "wait"]


def test_cache_flush_before_every_call_is_not_timed():
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


def test_machine_without_a_gpu(monkeypatch):
    monkeypatch.setattr(gpu, "devices", lambda: ())
    with pytest.raises(TargetError, match="no NVIDIA GPU"):
        TorchGpu()


@pytest.mark.skipif(torch.cuda.is_available(), reason="this PyTorch can use a GPU")
def test_pytorch_without_cuda(monkeypatch):
    monkeypatch.setattr(gpu, "devices", lambda: (gpu.GpuInfo(0, "NVIDIA H200", "sm_90", 1),))
    with pytest.raises(MissingDependencyError, match="PyTorch cannot use the GPU"):
        TorchGpu()


def test_read_driver_version(tmp_path):
    path = tmp_path / "version"
    path.write_text(
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  570.124.06  Wed Feb 26\nGCC 12"
    )
    assert read_driver_version(path) == "570.124.06"
    path.write_text("nothing")
    assert read_driver_version(path) is None
    assert read_driver_version(tmp_path / "none") is None
