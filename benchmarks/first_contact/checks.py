"""The checks, each of which runs in a process of its own. None needs TVM's Python package."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import platform
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from dcnv3_tvm import gpu, runtime
from dcnv3_tvm.dtypes import numpy_dtype
from dcnv3_tvm.errors import DeviceError
from dcnv3_tvm.runtime import CompiledModel, cuda_toolkit, kernel_runtime, library, tensors
from dcnv3_tvm.runtime.cuda import Gpu, format_bytes
from dcnv3_tvm.runtime.kernel import Kernel, KernelLibrary
from dcnv3_tvm.verify.entries import entry_outputs
from dcnv3_tvm.verify.tolerances import NORM_ERROR, model_tolerance
from first_contact.contents import BENCH_PARTS, ENCODERS, Contents, Operator, numbered

Details = dict[str, Any]
Check = Callable[[Contents], Details]

TESTS: Final = "tests/runtime/test_gpu.py"
BENCH: Final = "bench gpu"

BENCH_SECONDS: Final = 100.0
"""Time budget of ``bench gpu``; cases that do not fit are skipped."""

CALLS: Final = 20
"""Timed calls of a large encoder."""

_DEVICE: Final = "cuda:0"
_SLEEP: Final = 50_000_000
"""Cycles that PyTorch's kernel sleeps: about 30 ms."""
_SMALLEST_ALLOCATION: Final = 256
_MEMORY_MARGIN: Final = 1.3
_THREAD_CALLS: Final = 50


class NotRunError(Exception):
    """A check that cannot run here, and why."""


def checks(contents: Contents) -> dict[str, Check]:
    """Return the checks by name, in order."""
    manifest = contents.manifest
    operators = {
        operator.name: functools.partial(_operator, operator=operator)
        for operator in manifest.operators
    }
    models = {name: functools.partial(_model, name=name) for name in manifest.models}
    return {
        "device": _device,
        "toy": _toy,
        "toy, then PyTorch": _toy_then_torch,
        "PyTorch, then toy": _torch_then_toy,
        "toy on PyTorch's tensors": _toy_on_torch_tensors,
        **operators,
        ENCODERS[0]: _plain_encoder,
        ENCODERS[1]: _graph_encoder,
        "two streams": _two_streams,
        "out of memory": _out_of_memory,
        "two threads": _two_threads,
        **models,
        TESTS: _tests,
        BENCH: _bench,
    }


def _device(contents: Contents) -> Details:
    """Load a kernel and run it once; only that it ends without an error is checked."""
    present = gpu.device(0)
    driver = gpu.driver_version()
    operator = contents.manifest.operators[0]
    _run_operator(contents, operator)
    return {
        "GPU": present.name,
        "arch": present.arch,
        "driver": None if driver is None else "CUDA {}.{}".format(*driver),
        "python": platform.python_version(),
        "free": Gpu.of(0).free_bytes(),
    }


def _toy(contents: Contents) -> Details:
    with runtime.load(contents.toy) as model:
        _check_toy(contents, model)
    return {}


def _toy_then_torch(contents: Contents) -> Details:
    with runtime.load(contents.toy) as model:
        _check_toy(contents, model)
        details = _use_torch()
        _check_toy(contents, model)
    return details


def _torch_then_toy(contents: Contents) -> Details:
    details = _use_torch()
    with runtime.load(contents.toy) as model:
        _check_toy(contents, model)
    return details


def _use_torch() -> Details:
    """Import PyTorch and use its GPU."""
    torch = _torch(needs_gpu=False)
    usable = torch.cuda.is_available()
    if usable:
        _equal("PyTorch's sum", torch.ones(1000, device=_DEVICE).sum().cpu().numpy(), 1000)
    return {"torch": torch.__version__, "torch uses the GPU": usable}


def _torch(*, needs_gpu: bool = True) -> Any:
    try:
        import torch
    except ModuleNotFoundError as error:
        raise NotRunError("PyTorch is not installed") from error
    if needs_gpu and not torch.cuda.is_available():
        raise NotRunError(f"PyTorch {torch.__version__} sees no GPU")
    return torch


def _check_toy(contents: Contents, model: CompiledModel) -> None:
    stored = contents.arrays("toy")
    for image, logits in zip(stored["images"], stored["logits"], strict=True):
        _equal("logits", model(image), logits)


def _toy_on_torch_tensors(contents: Contents) -> Details:
    """Tensors in place, graph replay, then two streams of which one is behind."""
    torch = _torch()
    stored = contents.arrays("toy")
    images = torch.from_numpy(stored["images"]).to(_DEVICE)
    with runtime.load(contents.toy) as model:
        for _ in range(2):
            for image, logits in zip(images, stored["logits"], strict=True):
                result = model(image)
                _equal("device of the result", str(result.device), _DEVICE)
                _equal("logits", result.cpu().numpy(), logits)
        streams = [torch.cuda.Stream(), torch.cuda.Stream()]
        torch.cuda.synchronize()
        results = []
        for turn in range(8):
            with torch.cuda.stream(streams[turn % 2]):
                torch.cuda._sleep(_SLEEP if turn % 2 == 0 else 0)
                image = images[turn % len(images)].clone()
                results.append(model(image))
        torch.cuda.synchronize()
        for turn, result in enumerate(results):
            _equal("logits", result.cpu().numpy(), stored["logits"][turn % len(images)])
    return {"torch": torch.__version__}


def _operator(contents: Contents, operator: Operator) -> Details:
    arrays = contents.arrays(operator.name)
    outputs = _run_operator(contents, operator)
    worst = 0.0
    expected, bounds = numbered(arrays, "expected"), numbered(arrays, "bound")
    for output, right, bound in zip(outputs, expected, bounds, strict=True):
        error = np.abs(output.astype(np.float64) - right)
        if not np.all(error <= bound):
            count = int(np.sum(~(error <= bound)))
            raise AssertionError(f"{count} of {error.size} elements are outside of their bounds")
        worst = max(worst, float((error / bound).max()))
    return {"error / bound": worst}


def _run_operator(contents: Contents, operator: Operator) -> list[np.ndarray]:
    """Run a kernel, with NaN in the outputs beforehand."""
    manifest = contents.manifest
    kernel_runtime.load_runtime(contents.libraries)
    code = KernelLibrary(contents.code(operator.name).read_bytes(), on_gpu=True)
    kernel = Kernel(operator.kind, manifest.target, code)
    arrays = contents.arrays(operator.name)
    given = [
        array.astype(numpy_dtype(dtype))
        for array, dtype in zip(numbered(arrays, "input"), operator.inputs, strict=True)
    ]
    results = [
        np.full(expected.shape, np.nan, numpy_dtype(dtype))
        for expected, dtype in zip(numbered(arrays, "expected"), operator.outputs, strict=True)
    ]
    present = Gpu.of(0)
    on_gpu = [present.upload(tensors.to_kernel(array)) for array in (*given, *results)]
    kernel.run(_DEVICE, on_gpu)
    for result, tensor in zip(results, on_gpu[len(given) :], strict=True):
        present.download(tensor, result, 0)
    return results


def _plain_encoder(contents: Contents) -> Details:
    stored = contents.arrays("encoder")
    with runtime.load(contents.root / ENCODERS[0]) as model:
        return _check_reference(model, stored, entry_outputs(model, stored["images"][0]))


def _graph_encoder(contents: Contents) -> Details:
    """Compare with the model without a graph, bit for bit: captured, then replayed."""
    images = contents.arrays("encoder")["images"]
    plain, graph = (runtime.load(contents.root / name) for name in ENCODERS)
    with plain, graph:
        for _ in range(2):
            for image in images:
                expected, found = entry_outputs(plain, image), entry_outputs(graph, image)
                for entry, outputs in expected.items():
                    for index, output in enumerate(outputs):
                        _equal(f"{entry}{index}", found[entry][index], output)
    return {"images": len(images)}


def _check_reference(
    model: CompiledModel, stored: dict[str, np.ndarray], outputs: dict[str, list[np.ndarray]]
) -> Details:
    """Compare the outputs of all entries with float64; return the errors."""
    measure, bound = model_tolerance(model.metadata.dtype)
    errors = {}
    for entry, found in outputs.items():
        for index, output in enumerate(found):
            name = f"{entry}{index}"
            expected = stored[name]
            difference = output.astype(np.float64) - expected
            errors[name] = float(
                np.linalg.norm(difference) / np.linalg.norm(expected)
                if measure == NORM_ERROR
                else np.abs(difference).max() / np.abs(expected).max()
            )
            if not errors[name] <= bound:
                raise AssertionError(f"{name}: the error is {errors[name]:.2e}; allowed: {bound}")
    return {"errors": errors}


def _two_streams(contents: Contents) -> Details:
    """Two models by turns on two streams, which share memory and must wait for each other."""
    stored = contents.arrays("toy")
    images, logits = stored["images"], stored["logits"]
    with runtime.load(contents.toy) as first, runtime.load(contents.toy) as second:
        present = Gpu.of(0)
        streams = _new_streams(2)
        given = [present.upload(tensors.to_kernel(image)) for image in images]
        results = []
        for turn in range(16):
            model = (first, second)[turn // 2 % 2]
            with _stream(streams[turn % 2]):
                results.append(model(given[turn % len(given)]))
        for turn, result in enumerate(results):
            found = np.full(logits[0].shape, np.nan, np.float32)
            present.download(result, found, streams[turn % 2])
            _equal("logits", found, logits[turn % len(given)])
    return {}


def _new_streams(count: int) -> list[int]:
    create = library.tvm_ffi().get_global_func("runtime.Device_StreamCreate")
    return [int(create(Gpu.of(0).device)) for _ in range(count)]


def _stream(stream: int) -> contextlib.AbstractContextManager[Any]:
    context: contextlib.AbstractContextManager[Any] = library.tvm_ffi().use_raw_stream(
        Gpu.of(0).device, stream
    )
    return context


def _out_of_memory(contents: Contents) -> Details:
    """Make a first call without free memory, which fails, and calls after memory is freed."""
    with runtime.load(contents.toy) as model:
        present = Gpu.of(0)
        held = list(_all_memory(present))
        image = contents.arrays("toy")["images"][0]
        try:
            model(image)
        except DeviceError as error:
            message = str(error)
        else:
            raise AssertionError("a call without free memory raised nothing")
        if "too little free memory" not in message:
            raise AssertionError(f"the error does not name the cause: {message}")
        held.clear()
        present.release_unused()
        _check_toy(contents, model)
        _equal("CUDA's last error", cuda_toolkit.load_cudart().cudaPeekAtLastError(), 0)
    return {"error": message}


def _all_memory(present: Gpu) -> Iterator[Any]:
    size = present.free_bytes() or 2**30
    while size >= _SMALLEST_ALLOCATION:
        memory = _allocate(present, size)
        if memory is None:
            size //= 2
        else:
            yield memory


def _allocate(present: Gpu, size: int) -> Any:
    try:
        with present.translate_errors():
            return tensors.allocate((size,), "uint8", present.device)
    except DeviceError:
        return None


def _two_threads(contents: Contents) -> Details:
    """Use the default stream, of PyTorch as well, in a thread while another one replays graphs."""
    try:
        torch = _torch()
    except NotRunError as error:
        torch, details = None, {"PyTorch in the thread": f"not run: {error}"}
    else:
        details = {"torch": torch.__version__}
    stop, failures = threading.Event(), list[BaseException]()

    def use_default_stream() -> None:
        try:
            while not stop.is_set():
                _check_toy(contents, other)
                if torch is not None:
                    total = torch.ones(1000, device=_DEVICE).sum()
                    _equal("PyTorch's sum", total.cpu().numpy(), 1000)
        except BaseException as error:  # raised again below, in the main thread
            failures.append(error)

    stored = contents.arrays("toy")
    with (
        runtime.load(contents.toy, warm_up=True) as model,
        runtime.load(contents.toy, warm_up=True) as other,
    ):
        (stream,) = _new_streams(1)
        thread = threading.Thread(target=use_default_stream)
        thread.start()
        try:
            with _stream(stream):
                for turn in range(_THREAD_CALLS):
                    index = turn % len(stored["images"])
                    _equal("logits", model(stored["images"][index]), stored["logits"][index])
        finally:
            stop.set()
            thread.join()
    if failures:
        raise failures[0]
    return details


def _model(contents: Contents, name: str) -> Details:
    """Compare a large encoder with float64 and time its calls."""
    path = contents.model(name)
    stored = contents.arrays(name)
    with runtime.load(path) as model:
        entry = model.metadata.entries["main"].inputs[0]
        batch = int(entry.shape[0])
        images = np.resize(stored["images"], (batch, *stored["images"].shape[1:]))
        needed = _MEMORY_MARGIN * (model.metadata.activation_bytes["main"] + 2 * images.nbytes)
        free = Gpu.of(0).free_bytes()
        if free is not None and free < needed:
            raise NotRunError(
                f"it needs {format_bytes(int(needed))}, free are {format_bytes(free)}"
            )
        expected = {
            key: np.resize(array, (batch, *array.shape[1:]))
            for key, array in stored.items()
            if key != "images"
        }
        details = _check_reference(model, expected, entry_outputs(model, images))
        try:
            details |= _times(model, images)
        except NotRunError as error:
            details["times"] = f"not run: {error}"
    return details


def _times(model: CompiledModel, images: np.ndarray) -> Details:
    torch = _torch()
    given = torch.from_numpy(images).to(_DEVICE)
    for _ in range(3):
        model(given)
    seconds = []
    for _ in range(CALLS):
        torch.cuda.synchronize()
        start = time.perf_counter()
        model(given)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return {"median ms": 1e3 * statistics.median(seconds), "best ms": 1e3 * min(seconds)}


def _tests(contents: Contents) -> Details:
    """Run the tests that need a GPU."""
    _torch()
    missing = [name for name in ("pytest", "hypothesis") if importlib.util.find_spec(name) is None]
    if missing:
        raise NotRunError(f"{' and '.join(missing)} not installed")
    import pytest

    os.environ["DCNV3_TVM_FIRST_CONTACT"] = str(contents.root.resolve())
    root = Path(__file__).parents[2]
    code = pytest.main(["-q", "-p", "no:cacheprovider", f"--rootdir={root}", str(root / TESTS)])
    if code != pytest.ExitCode.OK:
        raise AssertionError(f"pytest: {code!s}")
    return {}


def _bench(contents: Contents) -> Details:
    """Measure operators with ``bench gpu``; without PyTorch's GPU, only load their kernels."""
    kernel_runtime.load_runtime(contents.libraries)
    paths = sorted(contents.bench.glob("*.so"))
    for path in paths:
        KernelLibrary(path.read_bytes(), on_gpu=True)[path.name.partition("-")[0]]
    try:
        _torch()
    except NotRunError as error:
        raise NotRunError(f"{error}; {len(paths)} kernels were loaded") from error
    from dcnv3_tvm.bench.gpu import run_gpu
    from dcnv3_tvm.bench.gpu_cases import select_cases

    groups, _ = select_cases(BENCH_PARTS, contents.manifest.bench)
    results = contents.root / "results"
    run = run_gpu(groups, [], results=results, artifacts=contents.bench, seconds=BENCH_SECONDS)
    if not run.ok:
        raise AssertionError(f"a result of this library is wrong; see {results}")
    return {"reports": list(run.reports), "skipped": run.skipped}


def _equal(name: str, found: Any, expected: Any) -> None:
    """Check that values are equal, bit for bit."""
    if not np.array_equal(found, expected):
        raise AssertionError(f"{name} differ: got {_first(found)}, expected {_first(expected)}")


def _first(value: Any) -> str:
    array = np.asarray(value)
    values: Sequence[Any] = array.reshape(-1)[:4].tolist()
    return f"{values} of {array.shape}" if array.ndim else str(value)
