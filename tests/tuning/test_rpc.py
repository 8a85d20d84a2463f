"""Sessions that measure through TVM's RPC tracker, on two servers of this machine."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dcnv3_tvm.spec import DCNv3Spec
from dcnv3_tvm.tuning.devices import remote_devices
from dcnv3_tvm.tuning.journal import SessionError
from dcnv3_tvm.tuning.laboratory import Laboratory
from dcnv3_tvm.tuning.session import Budget, Session, Setting
from dcnv3_tvm.tuning.tasks import operator_task
from dcnv3_tvm.tuning.tracker import count_servers

pytest.importorskip("tornado")

HOST = "127.0.0.1"
KEY = "here"


def free_port():
    with socket.socket() as sock:
        sock.bind((HOST, 0))
        return sock.getsockname()[1]


def start(*arguments):
    """Start a process with all that it will start, so that all of it can be ended."""
    return subprocess.Popen(
        [sys.executable, "-m", *map(str, arguments)],
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def end(process):
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def wait_for(condition, seconds=60.0):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        with contextlib.suppress(SessionError, OSError):
            if condition():
                return
        time.sleep(0.2)
    raise AssertionError("waited in vain")


@pytest.fixture(scope="module")
def tracker():
    port = free_port()
    process = start("tvm.exec.rpc_tracker", "--host", HOST, "--port", port, "--port-end", port + 1)
    try:
        wait_for(lambda: count_servers((HOST, port), KEY) == 0)
        yield HOST, port
    finally:
        end(process)


@pytest.fixture
def servers(tracker, request):
    """Start two servers, or as many as a test asks for."""
    host, port = tracker
    count = getattr(request, "param", 2)
    options = ["--tracker", f"{host}:{port}", "--key", KEY, "--host", HOST]
    processes = [
        start("dcnv3_tvm", "worker", *options, "--port", free_port()) for _ in range(count)
    ]
    try:
        wait_for(lambda: count_servers(tracker, KEY) == count)
        yield processes
    finally:
        for process in processes:
            end(process)


def test_a_server_killed_in_the_middle_loses_no_trial(tracker, servers, target, tmp_path):
    task = operator_task(DCNv3Spec.of((1, 9, 9, 32), group=2), target)
    devices = remote_devices(target, tracker, KEY, workers=2, threads=1)

    def kill_one(session):
        if session.trials == 3:
            end(servers[0])

    session = Session(
        tmp_path / "work",
        [task],
        Setting.of(target, hardware=devices.name, cores=1),
        Budget(100),
        on_news=kill_one,
    )
    with Laboratory(target, devices, builders=1, seconds=0.01) as laboratory:
        records = session.run(laboratory)
    entries = [json.loads(line) for line in (tmp_path / "work" / "trials.jsonl").open()]
    assert len(entries) == task.size
    assert not any(entry["error"] for entry in entries)
    assert list(records.by_workload) == [task.workload]


@pytest.mark.parametrize("servers", [1], indirect=True)
def test_a_server_that_is_stopped_is_gone(tracker, servers):
    children = [
        int(child)
        for server in servers
        for child in Path(f"/proc/{server.pid}/task/{server.pid}/children").read_text().split()
    ]
    assert children
    for server in servers:
        server.terminate()
        assert server.wait(timeout=30) == 0
    wait_for(lambda: count_servers(tracker, KEY) == 0)
    wait_for(lambda: not any(Path(f"/proc/{child}").exists() for child in children))


def test_a_tracker_without_servers(tracker, target):
    with pytest.raises(SessionError, match=r"no server of this key; got other at .*worker"):
        remote_devices(target, tracker, "other", workers=1, threads=1)


def test_no_tracker(target):
    with pytest.raises(SessionError, match=r"cannot be reached; .*tvm\.exec\.rpc_tracker"):
        remote_devices(target, (HOST, free_port()), KEY, workers=1, threads=1)
