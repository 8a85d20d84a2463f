"""Calls of a loaded model: inputs, outputs and errors."""

import concurrent.futures
import copy
import dataclasses
import gc
import itertools
import os
import pickle
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from dcnv3_tvm import runtime
from dcnv3_tvm.errors import ArtifactError, DeviceError, InvalidArgumentError
from dcnv3_tvm.runtime import call_threads, calls, library, thread_pool
from dcnv3_tvm.runtime.tensors import ALIGNMENT, aligned_bytes, aligned_copy
from helpers.forks import in_child

TASKS = "/proc/self/task"


@pytest.fixture
def model(artifact_path):
    with runtime.load(artifact_path) as loaded:
        yield loaded


def test_numpy(model, toy, image):
    result = model(image)
    assert isinstance(result, np.ndarray)
    np.testing.assert_array_equal(result, toy.main(image))


def test_torch(model, toy, image):
    result = model(torch.from_numpy(image).requires_grad_())
    assert isinstance(result, torch.Tensor)
    np.testing.assert_array_equal(result.numpy(), toy.main(image))


def test_tvm_ffi(model, toy, image):
    import tvm_ffi

    result = model(tvm_ffi.from_dlpack(aligned_copy(image)))
    assert isinstance(result, tvm_ffi.Tensor)
    np.testing.assert_array_equal(np.from_dlpack(result), toy.main(image))


def test_unaligned_tvm_ffi(model, toy, image):
    import tvm_ffi

    result = model(tvm_ffi.from_dlpack(_at_offset(image, 4)))
    np.testing.assert_array_equal(np.from_dlpack(result), toy.main(image))


def _at_offset(array, offset):
    buffer = aligned_bytes(array.nbytes + offset)[offset:].view(array.dtype).reshape(array.shape)
    buffer[...] = array
    assert buffer.ctypes.data % ALIGNMENT == offset
    return buffer


@pytest.mark.parametrize("offset", [0, 4, 16, 32, 60])
@pytest.mark.parametrize("kind", ["numpy", "torch"])
def test_any_alignment(model, toy, image, offset, kind):
    moved = _at_offset(image, offset)
    result = model(moved if kind == "numpy" else torch.from_numpy(moved))
    np.testing.assert_array_equal(np.asarray(result), toy.main(image))


def test_strided_read_only_and_big_endian(model, toy, image):
    strided = np.asfortranarray(image)
    frozen = image.copy()
    frozen.flags.writeable = False
    big_endian = image.astype(">f4")
    for array in (strided, frozen, big_endian, image[:, ::-1][:, ::-1]):
        np.testing.assert_array_equal(model(array), toy.main(image))
    channels_last = torch.from_numpy(image).to(memory_format=torch.channels_last)
    np.testing.assert_array_equal(model(channels_last).numpy(), toy.main(image))


def test_outputs_are_separate_and_writable(model, toy, image):
    first, second = model(image), model(image)
    first += 1
    np.testing.assert_array_equal(second, toy.main(image))


def test_features(model, toy, image):
    maps = model.features(image)
    assert len(maps) == 2
    np.testing.assert_array_equal(maps[0], image + toy.weights["bias"])
    np.testing.assert_array_equal(maps[1], np.maximum(image, 0))
    assert model.metadata.feature_info == [
        {"name": "feature_0", "channels": 3, "stride": 4},
        {"name": "feature_1", "channels": 3, "stride": 8},
    ]


def test_no_features(toy, tmp_path, image):
    path = toy.write(tmp_path / "logits", entries={"main": toy.metadata.entries["main"]})
    with pytest.raises(InvalidArgumentError, match="--features-only"):
        runtime.load(path).features(image)


def test_features_as_outputs_of_main(make_toy, tmp_path, image):
    toy = make_toy(1, features_only=True)
    model = runtime.load(toy.write(tmp_path / "maps"))
    by_name = model(image)
    assert list(by_name) == ["feature_0", "feature_1"]
    np.testing.assert_array_equal(by_name["feature_1"], np.maximum(image, 0))
    np.testing.assert_array_equal(model.features(image)[0], by_name["feature_0"])


def test_results_outlive_the_model(artifact_path, toy, image):
    model = runtime.load(artifact_path)
    results = [model(image) for _ in range(20)]
    maps = model.features(torch.from_numpy(image))
    model.close()
    del model
    gc.collect()
    for result in results:
        np.testing.assert_array_equal(result, toy.main(image))
    np.testing.assert_array_equal(maps[1].numpy(), np.maximum(image, 0))


def test_closed_model_raises(model, image):
    model.close()
    with pytest.raises(InvalidArgumentError, match="closed"):
        model(image)


@pytest.mark.parametrize("workers", [1, 3])
def test_concurrent_calls(artifact_path, toy, workers):
    model = runtime.load(artifact_path, threads=1, workers=workers)
    assert model.workers == workers
    images = np.random.default_rng(2).standard_normal((8, 1, 3, 8, 8)).astype(np.float32)
    failures = []

    def work(index):
        expected = toy.main(images[index])
        failures.extend(_ for _ in range(50) if not np.array_equal(model(images[index]), expected))

    workers = [threading.Thread(target=work, args=(index,)) for index in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not failures


def test_workers_run_side_by_side(either_artifact_path, image, monkeypatch):
    together = threading.Barrier(2)
    monkeypatch.setattr(thread_pool, "use_threads", lambda *_, **__: together.wait(timeout=60))
    model = runtime.load(either_artifact_path, workers=2)
    with concurrent.futures.ThreadPoolExecutor() as pool:
        assert len(list(pool.map(model, [image] * 4))) == 4  # Each passes the barrier with another.


def test_one_worker_serves_in_order_of_arrival(either_artifact_path, image, monkeypatch):
    started, go_on = threading.Event(), threading.Event()
    monkeypatch.setattr(thread_pool, "use_threads", lambda *_, **__: started.set() or go_on.wait())
    model = runtime.load(either_artifact_path)
    with concurrent.futures.ThreadPoolExecutor() as pool:
        calls = [pool.submit(model, image)]
        started.wait()
        calls += [pool.submit(model, image) for _ in range(3)]
        go_on.set()
        assert len([call.result() for call in calls]) == 4


def test_close_during_a_call(either_artifact_path, image, toy, monkeypatch):
    started, go_on = threading.Event(), threading.Event()
    monkeypatch.setattr(thread_pool, "use_threads", lambda *_, **__: started.set() or go_on.wait())
    model = runtime.load(either_artifact_path)
    with concurrent.futures.ThreadPoolExecutor() as pool:
        running = pool.submit(model, image)
        started.wait()
        waiting = pool.submit(model, image)
        model.close()
        go_on.set()
        np.testing.assert_array_equal(running.result(), toy.main(image))
        with pytest.raises(InvalidArgumentError, match="closed"):
            waiting.result()


def test_interrupted_call(either_artifact_path, image, toy, monkeypatch):
    model = runtime.load(either_artifact_path)
    main_thread = threading.get_ident()

    def interrupt(*_, **__):
        signal.pthread_kill(main_thread, signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(thread_pool, "use_threads", interrupt)
            for _ in range(3):
                with pytest.raises(KeyboardInterrupt):
                    model(image)
    finally:
        signal.signal(signal.SIGINT, before)
    np.testing.assert_array_equal(model(image), toy.main(image))


def test_call_interrupted_anywhere(either_artifact_path, image, toy, monkeypatch):
    """Signal handlers run after calls of functions: an error of theirs stops no other call."""
    model = runtime.load(either_artifact_path)
    files = {calls.__file__, call_threads.__file__}
    use_threads, others = thread_pool.use_threads, []

    def let_another_wait(count):
        if not others:
            others.append(executor.submit(model, image))
            while not model._execution._workers.waiting:
                time.sleep(0)
        use_threads(count)

    monkeypatch.setattr(thread_pool, "use_threads", let_another_wait)
    with concurrent.futures.ThreadPoolExecutor(2) as executor:
        for number in itertools.count():
            events = itertools.count()

            def interrupt(frame, event, _, events=events, number=number):
                after_a_call = event in ("call", "return", "c_return")
                if after_a_call and frame.f_code.co_filename in files and next(events) == number:
                    raise KeyboardInterrupt

            others.clear()
            sys.setprofile(interrupt)
            try:
                model(image)
            except KeyboardInterrupt:
                interrupted = True
            else:
                interrupted = False
            finally:
                sys.setprofile(None)
            others.append(executor.submit(model, image))
            for other in others:
                np.testing.assert_array_equal(other.result(timeout=60), toy.main(image))
            if not interrupted:
                break
    assert number > 20
    assert in_child(lambda: np.array_equal(model(image), toy.main(image)))


def test_system_that_starts_no_more_threads(make_toy, tmp_path, image, toy, monkeypatch):
    model = runtime.load(make_toy(1, pooled=False).write(tmp_path / "artifact"))

    def fail(_):
        raise RuntimeError("can't start new thread")

    model.threads = library.MAX_THREADS  # More than any idle thread can use.
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", fail)
        with pytest.raises(DeviceError, match="ulimit -u"):
            model(image)
    model.threads = 1
    np.testing.assert_array_equal(model(image), toy.main(image))


def test_default_threads_are_divided_among_workers(artifact_path, monkeypatch):
    monkeypatch.setenv("TVM_NUM_THREADS", "4")
    assert [runtime.load(artifact_path, workers=n).threads for n in (1, 2, 3, 8)] == [4, 2, 1, 1]


def test_dynamic_batch(make_toy, tmp_path):
    toy = make_toy("n")
    model = runtime.load(toy.write(tmp_path / "dynamic"))
    for batch in (1, 3, 17):
        x = np.random.default_rng(batch).standard_normal((batch, 3, 8, 8)).astype(np.float32)
        np.testing.assert_array_equal(model(x), toy.main(x))
    with pytest.raises(InvalidArgumentError, match=r"allowed: NCHW \(n, 3, 8, 8\)"):
        model(np.zeros((2, 3, 8, 9), np.float32))


def test_empty_batch(make_toy, tmp_path):
    import tvm_ffi

    model = runtime.load(make_toy("n").write(tmp_path / "dynamic"))
    none = np.zeros((0, 3, 8, 8), np.float32)
    for empty in (none, torch.from_numpy(none), tvm_ffi.from_dlpack(none)):
        result, maps = model(empty), model.features(image=empty)
        assert isinstance(result, type(empty))
        assert (tuple(result.shape), str(result.dtype)[-7:]) == ((0, 192), "float32")
        assert [tuple(feature.shape) for feature in maps] == [(0, 3, 8, 8)] * 2
    with pytest.raises(InvalidArgumentError, match="image is empty"):
        model(np.zeros((2, 3, 0, 8), np.float32))


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (np.zeros((1, 8, 8, 3), np.float32), r"NHWC.*x\.transpose\(0, 3, 1, 2\)"),
        (torch.zeros((1, 8, 8, 3)), r"x\.permute\(0, 3, 1, 2\)"),
        (np.zeros((3, 8, 8), np.float32), r"x\[None\]"),
        (np.zeros((8, 8), np.float32), "number of dimensions"),
        (np.zeros((2, 3, 8, 8), np.float32), "--dynamic-batch"),
        (np.zeros((1, 3, 9, 8), np.float32), r"allowed: NCHW \(1, 3, 8, 8\).*--size"),
        (np.zeros((1, 3, 8, 8)), r"float64; allowed: float32.*astype\('float32'\)"),
        (torch.zeros((1, 3, 8, 8), dtype=torch.float16), r"x\.to\(torch\.float32\)"),
        (np.zeros((1, 3, 8, 8), np.uint8), "preprocess"),
        ([[1.0]], "not a tensor"),
        ("photo.jpg", "preprocess"),
        (None, "not a tensor"),
    ],
)
def test_invalid_inputs_are_rejected(model, bad, message):
    with pytest.raises(InvalidArgumentError, match=message):
        model(bad)


def test_wrong_number_of_inputs(model, image):
    with pytest.raises(InvalidArgumentError, match="1: image"):
        model(image, image)
    with pytest.raises(InvalidArgumentError, match="got 0"):
        model()


def test_warm_up(make_toy, toy, tmp_path, image, monkeypatch):
    called = []
    run = runtime.CompiledModel._run_entry
    monkeypatch.setattr(
        runtime.CompiledModel,
        "_run_entry",
        lambda *given, **options: called.append(given[1]) or run(*given, **options),
    )
    model = runtime.load(make_toy("n").write(tmp_path / "dynamic"), warm_up=True, workers=2)
    assert called == ["main", "main", "features", "features"]
    np.testing.assert_array_equal(model(image), toy.main(image))
    with pytest.raises(InvalidArgumentError, match="warm_up"):
        runtime.load(tmp_path / "dynamic", warm_up="yes")


def test_calls_that_rotate_use_each_context():
    contexts = calls.Contexts(["a", "b", "c"])
    used = [contexts.run(lambda context: context, 1, here=True, rotate=True) for _ in range(6)]
    assert sorted(used[:3]) == ["a", "b", "c"]
    assert used[3:] == used[:3]
    assert len({contexts.run(lambda context: context, 1, here=True) for _ in range(3)}) == 1


def test_thread_count(either_artifact_path, toy, image):
    for threads in (1, 2, 1):
        model = runtime.load(either_artifact_path, threads=threads)
        assert model.threads == threads
        np.testing.assert_array_equal(model(image), toy.main(image))
    model.threads = 3
    np.testing.assert_array_equal(model(image), toy.main(image))
    with pytest.raises(InvalidArgumentError, match=r"threads is out of range; got 2\.5"):
        model.threads = 2.5


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="affinities are Linux's")
def test_threads_are_not_pinned(artifact_path, image):
    model = runtime.load(artifact_path, threads=2)
    for _ in range(3):
        model(image)
        time.sleep(0.005)  # They fall asleep, and are woken on another core than this one.
    deadline = time.monotonic() + 30
    while not all(os.sched_getaffinity(0) == cores for cores in affinities()):
        assert time.monotonic() < deadline
        time.sleep(0.001)  # A thread that has not run since is not back on all cores.
    assert len(affinities()) > 1


def affinities():
    return [os.sched_getaffinity(int(task)) for task in os.listdir(TASKS)]


def through_pickle(value):
    return pickle.loads(pickle.dumps(value))


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, through_pickle])
def test_pickle_and_copy(artifact_path, toy, image, duplicate):
    model = runtime.load(artifact_path, threads=1, workers=2, verify_digests=False)
    other = duplicate(model)
    assert other is not model
    assert (other.threads, other.workers, other.device) == (1, 2, "cpu")
    model.close()
    np.testing.assert_array_equal(other(image), toy.main(image))


def test_pickle_of_a_model_that_is_not_saved(toy, tmp_path, image):
    owner = tempfile.TemporaryDirectory(dir=tmp_path)
    model = runtime.load(toy.write(Path(owner.name) / "x"), owner=owner)
    with pytest.raises(ArtifactError, match=r"not saved.*model\.save"):
        pickle.dumps(model)
    model.save(tmp_path / "saved")
    pickled = pickle.dumps(model)
    model.close()
    np.testing.assert_array_equal(pickle.loads(pickled)(image), toy.main(image))
    dataclasses.replace(toy, weights={"bias": image[0]}).write(tmp_path / "saved")
    with pytest.raises(ArtifactError, match="replaced after the model was pickled"):
        pickle.loads(pickled)


def test_pickle_of_an_error():
    error = InvalidArgumentError("wrong", got=np.float32, allowed=3, hint="Fix it.")
    copied = through_pickle(error)
    assert type(copied) is InvalidArgumentError
    assert str(copied) == str(error)
    assert (copied.problem, copied.hint) == (error.problem, error.hint)
