"""Errors of streams, captures and launches that the emulated driver detects."""

import ctypes
import threading

import numpy as np
import pytest

DOUBLE = "out[threadIdx.x] = 2 * x[threadIdx.x];"
A, B = 5, 7
"""Streams that wait for no other."""

TO_GPU, TO_HOST, ON_GPU = 1, 2, 3


@pytest.fixture(scope="module")
def double(driver, compiled):
    return driver.function(compiled(DOUBLE, 64))


@pytest.fixture(autouse=True)
def finished(driver):
    yield
    for stream in (0, A, B):
        driver.synchronize(stream)


def host(values):
    array = np.array(values, np.float32)
    return array.ctypes.data, array


def test_result_is_read_before_it_is_computed(driver, double, rng):
    x, values = driver.array(rng.standard_normal(64))
    out, result = driver.array(np.full(64, np.nan))
    driver.launch(double, out, x, A)
    assert np.isnan(result).all()
    there, found = host(np.zeros(64))
    driver.copy(there, out, 64, TO_HOST, B)  # on a stream that does not wait
    assert np.isnan(found).all()
    driver.copy(there, out, 64, TO_HOST, A)
    np.testing.assert_array_equal(found, 2 * values)


@pytest.mark.parametrize("waits", [False, True])
def test_memory_is_reused_on_another_stream(driver, double, rng, waits):
    x, values = driver.array(rng.standard_normal(64))
    expected = 2 * values
    out, result = driver.array(np.full(64, np.nan))
    driver.launch(double, out, x, A)
    if waits:
        driver.wait(B, A)
    other, _ = host(np.ones(64))
    driver.copy(x, other, 64, TO_GPU, B)
    driver.synchronize(B)
    driver.synchronize(A)
    assert np.array_equal(result, expected) == waits


@pytest.mark.parametrize("waits", [False, True])
def test_streams_share_memory(driver, double, rng, monkeypatch, waits):
    monkeypatch.setenv("FAKE_INTERLEAVED", "1")
    shared, _ = driver.array(np.zeros(64))
    results = []
    for stream in (A, B):
        x, values = driver.array(rng.standard_normal(64))
        out, result = driver.array(np.zeros(64))
        if waits and stream == B:
            driver.wait(B, A)
        driver.launch(double, shared, x, stream)
        driver.launch(double, out, shared, stream)
        results.append((result, 4 * values))
    driver.synchronize(A)
    driver.synchronize(B)
    assert all(np.array_equal(*pair) for pair in results) == waits


def test_pageable_memory_may_change_after_a_copy(driver):
    x, values = driver.array(np.zeros(64))
    source, array = host(np.arange(64))
    driver.copy(x, source, 64, TO_GPU, A)
    array[:] = -1
    assert not values.any()
    driver.synchronize(A)
    np.testing.assert_array_equal(values, np.arange(64))


@pytest.mark.parametrize("create", ["cudaStreamCreate", "cudaStreamCreateWithFlags"])
def test_default_stream_waits_for_blocking_streams(driver, double, create):
    stream = driver.create(create, *([1] if "Flags" in create else []))
    x, _ = driver.array(np.ones(64))
    out, _ = driver.array(np.zeros(64))
    driver.launch(double, out, x, stream)
    there, found = host(np.zeros(64))
    driver.copy(there, out, 64, TO_HOST)
    assert found.any() == (create == "cudaStreamCreate")
    driver.synchronize(stream)


class Capture:
    """A capture of a blocking stream, as TVM's."""

    def __init__(self, driver):
        self.driver, self.stream = driver, driver.create("cudaStreamCreate")
        assert driver.cudaStreamBeginCapture(ctypes.c_void_p(self.stream), 0) == 0

    def end(self):
        """Return the error, and the graph."""
        graph = ctypes.c_void_p()
        stream = ctypes.c_void_p(self.stream)
        return self.driver.cudaStreamEndCapture(stream, ctypes.byref(graph)), graph

    def replay(self):
        error, graph = self.end()
        assert error == 0
        executable = ctypes.c_void_p(self.driver.create("cudaGraphInstantiate", graph, 0))
        self.driver.cudaGraphLaunch(executable, ctypes.c_void_p(self.stream))
        self.driver.synchronize(self.stream)


def test_launch_on_another_stream_is_not_captured(driver, double):
    x, _ = driver.array(np.ones(64))
    first, result = driver.array(np.zeros(64))
    second, stray = driver.array(np.zeros(64))
    third, copied = driver.array(np.zeros(64))
    capture = Capture(driver)
    driver.launch(double, first, x, capture.stream)
    driver.copy(third, first, 64, ON_GPU, capture.stream)
    driver.launch(double, second, x, A)
    driver.synchronize(A)
    assert stray.all()
    stray[:] = 0
    capture.replay()
    assert result.all()
    assert copied.all()
    assert not stray.any()


@pytest.mark.parametrize(
    "breaks",
    [
        lambda driver, _: driver.cudaMalloc(ctypes.byref(ctypes.c_void_p()), 64),
        lambda driver, kernel: driver.launch(kernel, 0, 0),
        lambda driver, _: driver.synchronize(0),
    ],
    ids=["allocation", "launch", "synchronization"],
)
def test_other_thread_breaks_a_capture(driver, double, breaks):
    errors = []
    capture = Capture(driver)
    thread = threading.Thread(target=lambda: errors.append(breaks(driver, double)))
    thread.start()
    thread.join()
    ended, graph = capture.end()
    assert errors[0] in (900, 906)
    assert (ended, graph.value) == (901, None)


def test_capture_is_ended_by_its_thread(driver):
    capture, ended = Capture(driver), []
    thread = threading.Thread(target=lambda: ended.append(capture.end()[0]))
    thread.start()
    thread.join()
    assert ended == [908]
    assert capture.end()[0] == 0


def test_copy_of_pageable_memory_cannot_be_captured(driver):
    x, _ = driver.array(np.ones(64))
    there, _ = host(np.zeros(64))
    for to, source, kind in ((there, x, TO_HOST), (x, there, TO_GPU)):
        capture = Capture(driver)
        assert driver.copy(to, source, 64, kind, capture.stream) == 900
        assert capture.end()[0] == 901


def test_registers_of_a_block(driver, compiled):
    """The assembler keeps within those of the threads that a kernel declares."""
    x, _ = driver.array(np.ones(1024))
    kernel = driver.function(compiled(DOUBLE, 64))
    assert driver.launch(kernel, x, x, threads=65) == 701
    assert driver.error() == "k: too many registers for the threads"
    undeclared = driver.function(compiled(DOUBLE, None))
    assert driver.launch(undeclared, x, x, threads=256) == 0
    assert driver.launch(undeclared, x, x, threads=288) == 701


def test_shared_memory_of_a_block(driver, compiled, monkeypatch):
    x, _ = driver.array(np.ones(64))
    body = f"__shared__ alignas(64) float tile[1024];\ntile[threadIdx.x] = 1;\n{DOUBLE}"
    kernel = driver.function(compiled(body, 64))

    def allow(kib):
        return driver.cuFuncSetAttribute(ctypes.c_void_p(kernel), 8, kib << 10)

    assert driver.launch(kernel, x, x, shared=44 << 10) == 0
    assert driver.launch(kernel, x, x, shared=45 << 10) == 701
    assert driver.error() == "k: more shared memory than allowed"
    assert allow(223) == 0  # of 227 KiB, 4 are static
    assert driver.launch(kernel, x, x, shared=223 << 10) == 0
    assert allow(224) == 1
    monkeypatch.setenv("FAKE_SM", "86")
    assert allow(95) == 0
    assert allow(96) == 1
