"""GPU artifacts on the emulated GPU: launches, copies, graphs, streams and memory.

Each test is a process that has the emulated GPU and checks the log of its driver.
"""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

PRELUDE = """
    import ctypes, sys
    import numpy as np
    from dcnv3_tvm import errors, runtime
    from dcnv3_tvm.runtime.cuda import Gpu

    fake = ctypes.CDLL("libcuda.so.1")
    fake.fake_log.restype = ctypes.c_char_p
    fake.fake_used.restype = ctypes.c_size_t
    path = sys.argv[1]
    image = np.random.default_rng(1).standard_normal((1, 3, 8, 8)).astype(np.float32)
    bias = np.random.default_rng(0).standard_normal((3, 8, 8)).astype(np.float32)

    def logits(x):
        return (np.maximum(x, 0) + bias).reshape(1, -1)

    def log():
        lines = fake.fake_log().decode().splitlines()
        fake.fake_clear()
        return lines

    def log_of(*starts):
        return [line for line in log() if line.startswith(starts)]

    def error_of(call):
        try:
            call()
        except errors.DCNv3Error as error:
            return f"{type(error).__name__}: {error}"
"""

TESTS = Path(__file__).parents[1]


@pytest.fixture
def run(emulated, gpu_artifact):
    def call(code: str, before: str = "", path: Path = gpu_artifact, **environment: str) -> str:
        script = "\n".join(map(textwrap.dedent, (before, PRELUDE, code)))
        done = subprocess.run(
            [sys.executable, "-c", script, str(path)],
            capture_output=True,
            text=True,
            timeout=300,
            env=os.environ | {"PYTHONPATH": str(TESTS)} | emulated | environment,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout.strip()

    return call


BLOCK_IMPORTS = """
    import importlib.abc, sys

    class Block(importlib.abc.MetaPathFinder):
        def find_spec(self, name, path=None, target=None):
            if name.split(".")[0] in {"torch", "tvm"}:
                raise ImportError(f"{name} is blocked")

    sys.meta_path.insert(0, Block())
"""
LOAD_AND_CALL = """
    model = runtime.load(path)
    assert model.device == "cuda:0"
    results = [model(image + i) for i in range(3)]
    assert all(np.array_equal(result, logits(image + i)) for i, result in enumerate(results))
    first, second = model.features(image)
    assert np.array_equal(first, image + bias) and np.array_equal(second, np.maximum(image, 0))
    mapped = {line.split()[-1] for line in open("/proc/self/maps") if "libtvm_runtime" in line}
    print(sum(name.startswith(path) for name in mapped), len(mapped))
"""


def test_without_torch_and_tvm_the_bundled_libraries_are_loaded(run):
    assert run(LOAD_AND_CALL, before=BLOCK_IMPORTS) == "2 2"


@pytest.mark.parametrize("before", ["", "import torch, tvm"])
def test_libraries_of_an_installed_tvm_are_preferred(run, before):
    bundled, _ = run(LOAD_AND_CALL, before=before).split()
    assert bundled == "0"


def test_weights_are_copied_once_and_the_code_is_a_cubin(run):
    run("""
    model = runtime.load(path)
    assert log_of("copy") == ["copy h2d 768 stream=0"]  # The bias.
    model(image), model(image)
    assert log_of("copy h2d", "load") == ["copy h2d 768 stream=0", "load cubin"] + [
        "copy h2d 768 stream=0"
    ]
    import os
    child = os.fork()
    if not child:
        errors_of_child = [error_of(lambda: model(image)), error_of(lambda: runtime.load(path))]
        os._exit(0 if all("forked after the GPU" in str(e) for e in errors_of_child) else 1)
    assert os.waitpid(child, 0)[1] == 0
    """)


def test_kernels_between_input_and_output_are_replayed_as_a_graph(run):
    run("""
    model = runtime.load(path)
    model(image)
    assert log_of("launch", "capture", "graph") == [
        "launch relu_kernel gpu=0 stream=0",
        "launch add_kernel gpu=0 stream=0",
        "capture add_kernel",
        "launch reshape_kernel gpu=0 stream=0",
    ]
    for shift in (1, 2):
        assert np.array_equal(model(image + shift), logits(image + shift))
        assert log_of("launch", "capture", "graph") == [
            "launch relu_kernel gpu=0 stream=0",
            "graph of 1 stream=0",
            "launch reshape_kernel gpu=0 stream=0",
        ]
    """)


def test_cuda_graph_disabled(run, make_toy, tmp_path):
    path = make_toy(1, arch="sm_90", cuda_graph=False).write(tmp_path / "plain")
    run(
        """
        model = runtime.load(path)
        for _ in range(2):
            log()
            assert np.array_equal(model(image), logits(image))
            kernels = [line.split()[1] for line in log_of("launch", "capture", "graph")]
            assert kernels == ["relu_kernel", "add_kernel", "reshape_kernel"]
        """,
        path=path,
    )


def test_calls_run_on_the_current_stream_after_those_on_the_previous_one(run):
    run("""
    import tvm_ffi

    model, other = runtime.load(path), runtime.load(path)
    gpu = Gpu.of(0)
    x = gpu.upload(tvm_ffi.from_dlpack(image))

    def call(model, stream):
        log()
        with tvm_ffi.use_raw_stream(gpu.device, stream):
            result = model(x)
        assert isinstance(result, tvm_ffi.Tensor) and str(result.device) == "cuda:0"
        buffer = np.empty((1, 192), np.float32)
        lines = log()
        gpu.download(result, buffer, stream)
        assert np.array_equal(buffer, logits(image))
        assert all(line.endswith(f"stream={stream}") for line in lines if "launch" in line)
        return [line for line in lines if "waits" in line], lines

    assert call(model, 0)[0] == []
    assert call(model, 7)[0] == ["stream 7 waits for 0"]
    waits, lines = call(model, 7)
    assert waits == [] and "graph of 1 stream=7" in lines
    assert call(other, 9)[0] == ["stream 9 waits for 7"]
    assert call(model, 9)[0] == []
    assert tvm_ffi.get_raw_stream(gpu.device) == 0
    model(image)
    assert log_of("stream") == ["stream 0 waits for 9"]

    import os
    os.environ["FAKE_INTERLEAVED"] = "1"

    inputs = [gpu.upload(tvm_ffi.from_dlpack(image + stream)) for stream in (7, 9)]

    def two_streams(waits):
        results = []
        for stream, x in zip((7, 9), inputs, strict=True):
            gpu._last_stream = gpu._last_stream if waits else None  # a planted fault
            with tvm_ffi.use_raw_stream(gpu.device, stream):
                results.append(model(x))
        for stream, result in zip((7, 9), results, strict=True):
            gpu.download(result, buffer := np.empty((1, 192), np.float32), stream)
            yield np.array_equal(buffer, logits(image + stream))

    assert list(two_streams(waits=True)) == [True, True]
    assert list(two_streams(waits=False)) != [True, True]
    """)


def test_two_gpus(run):
    run("""
    models = [runtime.load(path, device=f"cuda:{index}") for index in (1, 0, 1)]
    assert [model.device for model in models] == ["cuda:1", "cuda:0", "cuda:1"]
    for _ in range(2):
        for model in models:
            log()
            assert np.array_equal(model(image), logits(image))
            gpus = {line.split()[2] for line in log_of("launch")}
            assert gpus == {f"gpu={model.device[-1]}"}
    """)


def test_results_are_not_overwritten(run):
    run("""
    import tvm_ffi

    model, gpu = runtime.load(path), Gpu.of(0)
    inputs = [gpu.upload(tvm_ffi.from_dlpack(image + i)) for i in range(4)]
    results = [model(x) for x in inputs]
    maps = model.features(inputs[0])
    model.close()
    for i, result in enumerate(results):
        buffer = np.empty((1, 192), np.float32)
        gpu.download(result, buffer, 0)
        assert np.array_equal(buffer, logits(image + i))
    buffer = np.empty((1, 3, 8, 8), np.float32)
    gpu.download(maps[0], buffer, 0)
    assert np.array_equal(buffer, image + bias)
    """)


def test_close_frees_the_memory(run):
    run("""
    for _ in range(2):
        with runtime.load(path) as model:
            model(image), model.features(image)
            assert fake.fake_used() > 0
        assert fake.fake_used() == 0
    assert "InvalidArgumentError: the model is closed" in error_of(lambda: model(image))
    """)


def test_tensors_on_another_device(run):
    run("""
    import tvm_ffi

    model = runtime.load(path)
    there = Gpu.of(1).upload(tvm_ffi.from_dlpack(image))
    assert "a tensor on cuda:1; allowed: cuda:0" in error_of(lambda: model(there))
    here = tvm_ffi.from_dlpack(image.copy())
    assert "a tensor on cpu; allowed: cuda:0" in error_of(lambda: model(here))
    import torch
    message = error_of(lambda: model(torch.from_numpy(image)))
    assert 'a tensor on cpu; allowed: cuda:0. Use x.to("cuda:0").' in message
    """)


def test_out_of_memory_for_the_weights(run):
    out = run("print(error_of(lambda: runtime.load(path)))", FAKE_BYTES="700")
    assert out.startswith("DeviceError: the GPU cuda:0 has too little free memory")
    assert "needed: 0.0 MB for weights, free: 0.0 MB" in out
    assert "smaller batch" in out


def test_out_of_memory_in_a_call(run):
    out = run(
        """
        model = runtime.load(path)
        print(error_of(lambda: model(image)))
        assert "forget error" in log()
        """,
        FAKE_BYTES="6000",
    )
    assert "needed: 0.0 MB for weights and 0.0 MB for a call, free: 0.0 MB" in out


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"FAKE_SM": "80"}, "sm_90, but cuda:0 (Fake) is sm_80"),
        ({"FAKE_SM": "100"}, "Compile the model again with --target cuda-sm100"),
        ({"FAKE_GPUS": "0"}, "this machine has none, or no driver"),
        ({"FAKE_CUDA": "12080"}, "a driver for CUDA 12.8; allowed: CUDA 13.0 or newer"),
    ],
)
def test_gpu_or_driver_does_not_fit(run, environment, message):
    out = run("print(error_of(lambda: runtime.load(path)))", **environment)
    assert out.startswith("TargetError")
    assert message in out


def test_gpu_does_not_exist(run):
    out = run("print(error_of(lambda: runtime.load(path, device='cuda:2')))")
    assert "got cuda:2; allowed: cuda:0 (Fake), cuda:1 (Fake)" in out


def test_operator_runs_on_the_device_and_stream_of_its_tensors(run):
    run("""
    import tvm
    import dcnv3_tvm as dt
    from helpers import operator as problems
    from helpers.specs import random_inputs

    spec = dt.DCNv3Spec.of((1, 6, 5, 32), group=2, dtype="float16")
    inputs = random_inputs(spec, seed=1)
    arrays = problems.arguments(spec, inputs)
    x, offset, mask = (tvm.runtime.tensor(array, tvm.cuda(1)) for array in arrays)
    operator = dt.compile_op(spec, "cuda")
    import tvm_ffi

    for stream in (0, 5):
        log()
        with tvm_ffi.use_raw_stream(tvm.cuda(1), stream):
            result = dt.dcnv3(x, offset, mask, group=2)
        assert result.shape == (1, 6, 5, 32) and str(result.device) == "cuda:1"
        assert log_of("launch") == [f"launch dcnv3_kernel gpu=1 stream={stream}"]
        problems.check(result.numpy(), spec, inputs)
    assert dt.compile_op(spec, "cuda") is operator is dt.compile_op(spec, "cuda-sm90")
    assert "not on the operator's device; got cpu" in error_of(lambda: operator(*arrays))
    on_other = tvm.runtime.tensor(arrays[2], tvm.cuda(0))
    message = error_of(lambda: operator(x, offset, on_other))
    assert "mask: cuda:0; allowed: the same for all" in message
    processor = dt.compile_op(spec)
    assert "got cuda:1; allowed: cpu" in error_of(lambda: processor(x, offset, mask))
    ampere = dt.compile_op(spec, "cuda-sm80")
    assert "sm_80, where cuda:1 (Fake) has sm_90" in error_of(lambda: ampere(x, offset, mask))

    from dcnv3_tvm.compiler import compile_kernel as compilation

    compilation._compile = None
    compilation.compile_kernel.cache_clear()
    target = '{"arch": "sm_90", "kind": "cuda"}'
    from_disk = compilation.compile_kernel("dcnv3", spec, target, "default")
    assert from_disk.library is not operator.kernel.library
    result = tvm.runtime.empty(result.shape, "float16", tvm.cuda(1))
    from_disk.run("cuda:1", (x, offset, mask, result))
    problems.check(result.numpy(), spec, inputs)
    """)


def test_command_line(run, tmp_path):
    photo = tmp_path / "photo.png"
    out = run(
        f"""
        import PIL.Image
        from dcnv3_tvm.cli import main

        PIL.Image.new("RGB", (20, 10), (200, 30, 90)).save({str(photo)!r})
        assert main(["env"]) == 0
        assert main(["info", path]) == 0
        assert main(["run", path, {str(photo)!r}, "--device", "cuda:1", "--repeat", "2"]) == 0
        assert main(["run", path, {str(photo)!r}, "--device", "cpu"]) == 2
        """
    )
    assert "Fake, sm_90, 1 GB" in out
    lines = {" ".join(line.split()) for line in out.splitlines()}
    assert {"NVIDIA driver CUDA 13.0", "runs here yes"} <= lines
    assert any(line.startswith("system ") and line.endswith("GPU sm_90") for line in lines)
    assert "2 calls, on cuda:1, with copies between host and device" in out


def test_retried_allocation_leaves_no_error(run, make_toy, tmp_path):
    """PyTorch's next check would raise it: the pool of TVM frees memory and tries again."""
    large = make_toy(40, arch="sm_90").write(tmp_path / "large")
    run(
        """
    import os
    first, second = runtime.load(os.environ["LARGE"]), runtime.load(path)
    for _ in range(2):  # The pool keeps the memory of the first result.
        first(np.zeros((40, 3, 8, 8), np.float32))
    os.environ["FAKE_BYTES"] = str(fake.fake_used() + 1000)
    log()
    assert np.array_equal(second(image), logits(image))
    assert log_of("no memory", "forget") == ["no memory", "forget error"]
    assert ctypes.CDLL("libcudart.so.13").cudaPeekAtLastError() == 0
    """,
        LARGE=str(large),
    )


@pytest.mark.parametrize("end", ["model.close()", "del model", "pass"])
def test_model_ends_after_a_fault(run, end):
    """Destructors of graphs and memory would throw, which ends the process."""
    run(f"""
    model = runtime.load(path)
    model(image)
    fake.fake_fault()
    assert "DeviceError: the GPU cuda:0 failed" in error_of(lambda: model(image))
    log()
    {end}
    import gc; gc.collect()
    assert not [line for line in log() if line.startswith(("free", "graph"))]
    """)


def test_model_is_closed_after_a_capture_of_another_thread(run):
    """Freeing memory during a capture fails, in a destructor, which ends the process."""
    run("""
    import threading
    from dcnv3_tvm.runtime import cuda

    model, gpu = runtime.load(path), Gpu.of(0)
    model(image)
    gpu.is_usable = lambda: True  # which would wait, too
    cudart, stream, graph = ctypes.CDLL("libcudart.so.13"), ctypes.c_void_p(), ctypes.c_void_p()
    cudart.cudaStreamCreate(ctypes.byref(stream))
    closing = threading.Thread(target=model.close)
    with cuda._call_lock:
        cudart.cudaStreamBeginCapture(stream, 0)
        closing.start()
        closing.join(0.2)
        assert closing.is_alive()
        assert cudart.cudaStreamEndCapture(stream, ctypes.byref(graph)) == 0
    closing.join()
    assert fake.fake_used() == 0
    """)


def test_invalidated_capture_is_tried_again(run):
    run(
        """
    model = runtime.load(path)
    assert np.array_equal(model(image), logits(image))
    assert np.array_equal(model(image + 1), logits(image + 1))
    assert log_of("graph of")
    """,
        FAKE_INVALID_CAPTURES="1",
    )


def test_warm_up_captures_graphs(run):
    run("""
    model = runtime.load(path, warm_up=True)
    assert log_of("capture")
    assert np.array_equal(model(image), logits(image)) and model.features(image)
    assert not log_of("capture", "load")
    """)
