"""Forked children call models and operators of their parent."""

import concurrent.futures
import ctypes
import os
import signal
import threading

import numpy as np
import pytest

from dcnv3_tvm import compile_op, runtime
from dcnv3_tvm.errors import DCNv3Error
from dcnv3_tvm.forks import RenewedLock, fork_safe_lock
from dcnv3_tvm.spec import DCNv3Spec
from helpers.forks import in_child

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="fork is Unix's"),
    # Python warns of what this library makes safe.
    pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning"),
]

SPEC = DCNv3Spec.of((1, 4, 5, 8), group=2)


@pytest.fixture
def model(either_artifact_path):
    with runtime.load(either_artifact_path, threads=2) as loaded:
        yield loaded


@pytest.fixture
def calls(model, either_artifact_path, toy, image):
    """Calls by name, which return whether the result is right."""
    rng = np.random.default_rng(0)
    tensors = [
        rng.standard_normal(shape).astype(np.float32)
        for shape in (SPEC.input_shape, SPEC.offset_shape, SPEC.mask_shape)
    ]
    operator = compile_op(SPEC)
    expected = operator(*tensors)

    def loaded_anew():
        with runtime.load(either_artifact_path, threads=2) as other:
            return np.array_equal(other(image), toy.main(image))

    return {
        "same model": lambda: np.array_equal(model(image), toy.main(image)),
        "loaded anew": loaded_anew,
        "operator": lambda: np.array_equal(operator(*tensors), expected),
    }


@pytest.mark.parametrize("form", ["same model", "loaded anew", "operator"])
def test_call_after_a_call_of_the_parent(calls, form):
    assert all(call() for call in calls.values())
    assert in_child(calls[form])
    assert calls[form]()  # The parent goes on.
    assert in_child(lambda: in_child(calls[form]))


def test_fork_while_other_threads_call(calls):
    stop = threading.Event()
    wrong = []

    def work(call):
        while not stop.is_set():
            if not call():
                wrong.append(call)

    threads = [threading.Thread(target=work, args=(call,)) for call in calls.values()]
    for thread in threads:
        thread.start()
    try:
        for _ in range(3):
            assert all(in_child(call) for call in calls.values())
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert not wrong


def test_fork_while_calls_wait(calls, model, image, toy):
    """Several threads wait for the only worker; the child neither runs nor awaits their calls."""
    results = []
    threads = [threading.Thread(target=lambda: results.append(model(image))) for _ in range(16)]
    for thread in threads:
        thread.start()
    assert in_child(lambda: all(calls["same model"]() for _ in range(3)))
    for thread in threads:
        thread.join()
    assert len(results) == 16
    assert all(np.array_equal(result, toy.main(image)) for result in results)


def test_several_threads_of_the_child(calls):
    def work():
        with concurrent.futures.ThreadPoolExecutor(9) as pool:
            return all(pool.map(lambda call: call(), [*calls.values()] * 3))

    assert calls["same model"]()
    assert in_child(work)


@pytest.mark.parametrize("form", ["same model", "operator"])
def test_fork_in_a_signal_handler_during_a_call(calls, form, monkeypatch):
    monkeypatch.setattr("dcnv3_tvm.runtime.kernel._threads", lambda: 1)  # In the caller's thread.
    sent, forked = [], []

    def interrupt_once(*_, **__):
        if not sent:
            sent.append(True)
            # In this thread, before it returns: a later one would meet the default handler.
            signal.raise_signal(signal.SIGUSR1)

    monkeypatch.setattr("dcnv3_tvm.runtime.thread_pool.use_threads", interrupt_once)
    before = signal.signal(signal.SIGUSR1, lambda *_: forked.append(in_child(lambda: True)))
    try:
        assert calls[form]()
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert forked == [True]


def test_lock_is_free_in_the_child():
    lock = fork_safe_lock()
    held, release = threading.Event(), threading.Event()

    def hold():
        with lock:
            held.set()
            release.wait()

    holder = threading.Thread(target=hold)
    holder.start()
    held.wait()
    threading.Timer(0.05, release.set).start()
    assert in_child(lambda: lock.acquire(blocking=False))
    holder.join()
    with lock:  # The parent's is free, too.
        pass


def test_renewed_lock_is_free_in_the_child_while_held():
    lock = RenewedLock()

    def hold_in_a_thread():
        with lock.hold():
            held.append(True)

    held = []
    with lock.hold():
        holder = threading.Thread(target=hold_in_a_thread)
        holder.start()

        def held_by_another_thread():
            other = threading.Thread(target=hold_in_a_thread)
            other.start()
            other.join(timeout=30)
            return len(held) == 1

        assert in_child(held_by_another_thread)
        assert not held
    holder.join()
    assert held


def test_fork_by_a_server_in_c(model, image, toy, monkeypatch):
    """Python's hooks do not run: only the process differs."""
    assert np.array_equal(model(image), toy.main(image))
    monkeypatch.setattr(os, "fork", ctypes.CDLL(None).fork)
    assert in_child(lambda: np.array_equal(model(image), toy.main(image)))


def test_error_in_the_child_is_raised_there(model, image):
    def rejected():
        try:
            model(image[..., :4])
        except DCNv3Error:
            return True
        return False

    assert in_child(rejected)
