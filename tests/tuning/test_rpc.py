"""Sessions that measure through TVM's RPC tracker, with servers on this machine."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dcnv3_tvm.errors import TuningError
from dcnv3_tvm.spec import DCNv3Spec
from dcnv3_tvm.tuning.context import MeasurementContext
from dcnv3_tvm.tuning.device_pool import remote_devices
from dcnv3_tvm.tuning.measurer import Measurer
from dcnv3_tvm.tuning.rpc import RpcConfig, count_servers
from dcnv3_tvm.tuning.session import TuningBudget, TuningSession
from dcnv3_tvm.tuning.tasks import operator_task

pytest.importorskip("tornado")

HOST = "127.0.0.1"
KEY = "here"


def free_port():
    with socket.socket() as sock:
        sock.bind((HOST, 0))
        return sock.getsockname()[1]


def start(*arguments):
    """Start a process in a session of its own, so that its children can be killed with it."""
    return subprocess.Popen(
        [sys.executable, "-m", *map(str, arguments)],
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def kill(process):
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def wait_until(condition, *processes):
    """Wait for a condition that living processes will bring about."""
    while True:
        with contextlib.suppress(TuningError, OSError):
            if condition():
                return
        assert all(process.poll() is None for process in processes)
        time.sleep(0.05)


@pytest.fixture(scope="module")
def rpc():
    port = free_port()
    process = start("tvm.exec.rpc_tracker", "--host", HOST, "--port", port, "--port-end", port + 1)
    config = RpcConfig(HOST, port, KEY, workers=2)
    try:
        wait_until(lambda: count_servers(config) == 0, process)
        yield config
    finally:
        kill(process)


@pytest.fixture
def servers(rpc):
    """Start two servers."""
    options = ["--tracker", rpc.address, "--key", KEY, "--host", HOST]
    processes = [start("dcnv3_tvm", "worker", *options, "--port", free_port()) for _ in range(2)]
    try:
        wait_until(lambda: count_servers(rpc) == 2, *processes)
        yield processes
    finally:
        for process in processes:
            kill(process)


def test_killed_server_loses_no_trial_and_stopped_server_deregisters(
    rpc, servers, target, tmp_path, logged_trials
):
    task = operator_task(DCNv3Spec.of((1, 9, 9, 32), group=2), target)
    devices = remote_devices(target, rpc, threads=1)

    def kill_one(session):
        if session.trials == 3:
            kill(servers[0])

    session = TuningSession(
        tmp_path / "work",
        [task],
        MeasurementContext.of(target, hardware=devices.hardware, cores=1),
        TuningBudget(100),
        on_update=kill_one,
    )
    with Measurer(target, devices, builders=1, seconds=0.01, timeout=600) as measurer:
        records = session.run(measurer)
    trials = logged_trials()
    assert len(trials) == task.size
    assert not any(trial["error"] for trial in trials)
    assert list(records.by_workload) == [task.workload]

    remaining = servers[1]
    children = Path(f"/proc/{remaining.pid}/task/{remaining.pid}/children").read_text().split()
    assert children
    remaining.terminate()
    assert remaining.wait() == 0
    wait_until(lambda: count_servers(rpc) == 0)
    wait_until(lambda: not any(Path(f"/proc/{child}").exists() for child in children))


def test_tracker_without_servers_raises(rpc, target):
    other = RpcConfig(rpc.host, rpc.port, "other")
    with pytest.raises(TuningError, match=r"no server for this key; got other at .*worker"):
        remote_devices(target, other, threads=1)


def test_unreachable_tracker_raises(target):
    with pytest.raises(TuningError, match=r"cannot be reached; .*tvm\.exec\.rpc_tracker"):
        remote_devices(target, RpcConfig(HOST, free_port(), KEY), threads=1)
