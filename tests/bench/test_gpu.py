"""A complete GPU benchmark with simulated times and memory, computed on the CPU."""

import dataclasses
import json
import subprocess
import sys
import types

import numpy as np
import pytest
import torch

from dcnv3_tvm import gpu, machine
from dcnv3_tvm.bench import gpu_encoder, gpu_gradient, gpu_operator
from dcnv3_tvm.bench.backends import OURS
from dcnv3_tvm.bench.budget import OutOfTimeError, TimeBudget
from dcnv3_tvm.bench.cases import EncoderCase, encoder_case
from dcnv3_tvm.bench.gpu import GpuBenchmark, GpuRun, result_name
from dcnv3_tvm.bench.gpu_cases import OperatorGroup, with_logits
from dcnv3_tvm.bench.gpu_compilation import compile_ahead, compile_job, compiled_path, load_kernel
from dcnv3_tvm.bench.gpu_operator import READY, operator_inputs, tolerance
from dcnv3_tvm.bench.measure import Plan
from dcnv3_tvm.bench.roofline import Peaks
from dcnv3_tvm.cli import main
from dcnv3_tvm.cli.bench_text import report_text
from dcnv3_tvm.errors import MissingDependencyError, TargetError
from dcnv3_tvm.op.reference import dcnv3_reference
from dcnv3_tvm.op.reference_gradient import dcnv3_gradients
from dcnv3_tvm.runtime import library
from dcnv3_tvm.spec import DCNv3Spec
from dcnv3_tvm.verify.pytorch_reference import PyTorchOperator

TINY = "test_internimage_pre_norm"
ENCODER = encoder_case(TINY, batch=2)
SPEC = DCNv3Spec.of((2, 9, 7, 8), group=2)
PEAKS = Peaks(flops=67e12, bytes=4.3e12, how="made up", half_flops=790e12)
PLAN = Plan(rounds=2, calls=3, dropped=1, pause=0.0)


class FakeGpu:
    """An H200 with tensors on the CPU, whose calls take a millisecond."""

    torch_device = torch.device("cpu")
    name, slug, target, driver = "NVIDIA H200", "h200", "cuda-sm90", "570.124.06"

    def __init__(self):
        self.flushes = 0
        self.broken = False

    def seconds_of(self, call):
        call()
        return 1e-3

    def flush(self, repeats):
        def write():
            self.flushes += repeats

        return write

    def peak_bytes(self, call):
        call()
        return 1000

    def release(self):
        if self.broken:
            raise RuntimeError("an illegal memory access was encountered")

    def peaks(self):
        return PEAKS


class FakePool:
    """Compiles encoders for the CPU, and no operators."""

    def __init__(self, folder):
        self.folder = folder
        self.submitted = []
        self.late = set()

    def submit(self, submitted):
        self.submitted += submitted

    def result(self, job, _seconds):
        if job in self.late:
            raise OutOfTimeError("not compiled in time")
        if not isinstance(job, EncoderCase):
            return compiled_path(job, self.folder)
        return compile_job(job, self.folder, "auto")


class Operator:
    """Stands in for `load_operator`, and computes the PyTorch reference implementation."""

    wrong = False

    def __init__(self, spec, path, target):
        assert path.name == f"{spec.slug}.so"
        assert target == "cuda-sm90"
        self.spec = spec

    def __call__(self, x, offset, mask):
        mask = mask.double()
        if self.spec.softmax:
            mask = mask.unflatten(-1, (self.spec.group, -1)).softmax(-1).flatten(-2)
        y = PyTorchOperator(self.spec)(x.double(), offset.double(), mask).to(x.dtype)
        return 1.01 * y if self.wrong else y


class DCNv4Function:
    """Computes wrong outputs."""

    @staticmethod
    def apply(x, *_):
        return torch.zeros_like(x)


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory):
    return tmp_path_factory.mktemp("artifacts")


@pytest.fixture
def run(monkeypatch, tmp_path, artifacts):
    monkeypatch.setattr(gpu_operator, "load_operator", Operator)
    for module in (gpu_operator, gpu_encoder):
        monkeypatch.setattr(module, "PLAN", PLAN)
    for name in ("DCNv3", "DCNv4"):
        monkeypatch.setitem(sys.modules, name, None)
    # torch.compile would take half a minute.
    monkeypatch.setattr("dcnv3_tvm.bench.gpu._COMPILE_SECONDS", {"op": 1e9, "encoder": 1e9})
    device, pool = FakeGpu(), FakePool(artifacts)

    def start(groups=(), cases=(), seconds=100.0):
        found = GpuBenchmark(
            device, pool, tmp_path / "results", TimeBudget(seconds, lambda: 0.0)
        ).run(groups, cases)
        return found, {path.name for path in (tmp_path / "results").iterdir()}

    start.device, start.pool, start.folder = device, pool, tmp_path / "results"
    return start


def group(*specs, dtype="float32"):
    given = tuple(dataclasses.replace(spec, dtype=dtype) for spec in specs)
    return OperatorGroup("tiny", dtype, given)


def rows_of(found, report=0, case=0):
    rows = list(found.reports.values())[report].cases[case].rows
    return {row.name: row for row in rows}


TORCH = ".".join(torch.__version__.split(".")[:2])


def test_operator(run):
    found, files = run([group(SPEC)])
    name = f"cuda-h200-op-tiny-f32-torch{TORCH}"
    assert files == {f"{name}.json", f"cuda-h200-run-torch{TORCH}.json"}
    rows = rows_of(found)
    assert list(rows) == [OURS, READY, "torch", "compile"]
    for label in (OURS, READY, "torch"):
        assert rows[label].seconds.median == 1e-3
        assert rows[label].ratio.median == 1.0
        assert rows[label].error <= rows[label].tolerance
        inputs = 9 * 7 * 2 * 4 * (8 + 36 + 18)
        assert rows[label].peak_bytes == inputs + 1000
    assert "no time: 1000000000 s expected" in rows["compile"].failure
    assert run.device.flushes == 3 * 2 * 3 * gpu_operator.FLUSHES
    assert found.ok
    assert run.pool.submitted == [with_logits(SPEC), SPEC]
    written = json.loads((run.folder / f"{name}.json").read_text())
    assert written["provenance"]["gpu"] == "NVIDIA H200"
    assert written["provenance"]["driver"] == "570.124.06"
    assert written["provenance"]["versions"]["torch"] == torch.__version__
    (case,) = written["cases"]
    assert case["roofline"]["memory"] == pytest.approx(SPEC.bytes / 4.3e12)
    assert [row["name"] for row in case["rows"]] == list(rows)
    assert case["rows"][0]["seconds"]["median"] == 1e-3


def test_gradients(run, monkeypatch):
    def backward(x, offset, mask, *parameters):
        grad = parameters[11]
        arrays = [tensor.double().numpy() for tensor in (grad, x, offset, mask)]
        return [torch.from_numpy(gradient) for gradient in dcnv3_gradients(*arrays, SPEC)]

    def load(_spec, paths, _target):
        assert {path.name for path in paths.values()} == {
            f"{job.slug}.so" for job in run.pool.submitted
        }
        return lambda grad, *arguments: backward(*arguments, *[None] * 11, grad)

    module = types.ModuleType("DCNv3")
    module.dcnv3_backward = module.dcnv3_forward = backward
    monkeypatch.setitem(sys.modules, "DCNv3", module)
    monkeypatch.setattr(gpu_gradient, "load_gradients", load)
    monkeypatch.setattr(gpu_gradient, "PLAN", PLAN)
    found, _ = run([group(SPEC)._replace(backward=True)])
    rows = rows_of(found)
    assert list(rows) == [OURS, "torch", "DCNv3 extension"]
    assert all(row.error <= row.tolerance < 0.01 for row in rows.values())
    assert found.ok
    (case,) = next(iter(found.reports.values())).cases
    assert case.slug == f"{SPEC.slug}-backward"


def test_missing_extensions_are_listed(run):
    found, _ = run([group(SPEC, dtype="bfloat16")])
    for name in ("DCNv3 extension", "DCNv4 extension"):
        assert "not importable" in found.skipped[name]
    text = report_text(found)
    assert "skipped DCNv3 extension: not importable" in text
    assert "NVIDIA H200 (driver 570.124.06)" in text
    assert "790000 in 16-bit matmuls" in text
    summary = json.loads((run.folder / f"cuda-h200-run-torch{TORCH}.json").read_text())
    assert summary["skipped"] == found.skipped
    assert summary["reports"] == [f"cuda-h200-op-tiny-bf16-torch{TORCH}"]
    # Only this library is measured in bfloat16.
    assert list(rows_of(found)) == [OURS, READY]


@pytest.fixture
def dcnv4(monkeypatch):
    package, functions, module = (types.ModuleType(name) for name in ("DCNv4", "f", "m"))
    package.__path__ = functions.__path__ = []
    module.DCNv4Function = DCNv4Function
    names = ("DCNv4", "DCNv4.functions", "DCNv4.functions.dcnv4_func")
    for name, stand_in in zip(names, (package, functions, module), strict=True):
        monkeypatch.setitem(sys.modules, name, stand_in)


@pytest.mark.usefixtures("dcnv4")
def test_wrong_peer_is_not_timed(run):
    found, _ = run([group(SPEC, dtype="float16")], seconds=60.0)
    assert "DCNv4 extension" not in found.skipped
    rows = rows_of(found)
    wrong = rows["DCNv4 extension"]
    assert wrong.wrong
    assert wrong.seconds is None
    assert wrong.ratio is None
    assert rows[OURS].seconds is not None
    # A wrong peer is not an error of the run.
    assert found.ok
    assert "wrong outputs of DCNv4 extension" in report_text(found)


def test_wrong_outputs_of_ours_are_not_timed(run, monkeypatch):
    monkeypatch.setattr(Operator, "wrong", True)
    found, _ = run([group(SPEC, dtype="bfloat16"), group(SPEC)], seconds=60.0)
    assert not found.ok
    assert all(
        row.wrong and row.seconds is None
        for row in rows_of(found, report=1).values()
        if row.name.startswith(OURS)
    )
    rows = rows_of(found, report=1)
    assert rows["torch"].seconds is not None
    assert rows["torch"].ratio is None


def test_late_and_skipped_cases_are_listed(run):
    late = dataclasses.replace(SPEC, batch=1)
    run.pool.late = {with_logits(late)}
    found, _ = run([group(late)])
    rows = rows_of(found)
    assert rows[OURS].failure == "not compiled in time"
    assert rows[READY].seconds is not None
    assert not found.ok
    found, _ = run([group(SPEC)], [ENCODER], seconds=0.5)
    assert found.reports == {}
    for slug in (SPEC.slug, ENCODER.slug):
        assert found.skipped[slug] == "no time left"


def test_failure_of_the_gpu_ends_the_measurements(run):
    run.device.broken = True
    found, files = run([group(SPEC), group(dataclasses.replace(SPEC, batch=3))])
    reason = found.skipped[dataclasses.replace(SPEC, batch=3).slug]
    assert "the GPU had failed" in reason
    assert "illegal memory access" in reason
    # Earlier results are kept.
    assert f"cuda-h200-op-tiny-f32-torch{TORCH}.json" in files


def test_encoder(run):
    found, files = run(cases=[ENCODER])
    name = f"cuda-h200-encoder-{ENCODER.slug}-torch{TORCH}"
    assert f"{name}.json" in files
    rows = rows_of(found)
    assert list(rows) == [OURS, "torch", "compile"]
    assert rows[OURS].error < 1e-4
    assert rows["torch"].error < 1e-4
    assert rows[OURS].seconds.median == 1e-3
    assert rows["compile"].failure.startswith("no time")
    assert run.device.flushes == 2 * 2 * 3
    image, weights = 2 * 3 * 32 * 32 * 4, rows["torch"].peak_bytes - 1000
    assert rows[OURS].peak_bytes > weights > image
    assert found.ok


def test_encoder_with_the_extension(run, monkeypatch):
    module = types.ModuleType("DCNv3")
    module.dcnv3_forward = lambda *_: 1 / 0
    monkeypatch.setitem(sys.modules, "DCNv3", module)
    found, _ = run(cases=[ENCODER])
    rows = rows_of(found)
    assert list(rows) == [OURS, "torch + extension", "compile + extension"]
    assert "ZeroDivisionError" in rows["torch + extension"].failure


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_inputs_and_references(dtype):
    spec = DCNv3Spec.of((11, 5, 6, 12), group=3, dtype=dtype)
    inputs = operator_inputs(spec, torch.device("cpu"))
    tensors = {name: getattr(inputs, name) for name in ("x", "offset", "mask", "logits")}
    assert all(str(tensor.dtype) == f"torch.{dtype}" for tensor in tensors.values())
    assert 1.9 < tensors["offset"].abs().max() <= 2.0
    x, offset, mask, logits = (tensor.double().numpy() for tensor in tensors.values())
    np.testing.assert_allclose(
        inputs.reference, dcnv3_reference(x, offset, mask, spec), rtol=0, atol=1e-12
    )
    exact = with_logits(spec)
    reference = dcnv3_reference(x, offset, logits, exact)
    np.testing.assert_allclose(inputs.softmax_reference, reference, rtol=0, atol=1e-12)
    least = {"float32": 1e-7, "float16": 2.0**-11, "bfloat16": 2.0**-8}[dtype]
    for problem in (spec, exact):
        assert least < tolerance(problem, inputs) < least + 5e-5


def test_torch_compile_is_timed(run, monkeypatch):
    monkeypatch.setattr("dcnv3_tvm.bench.gpu._COMPILE_SECONDS", {"op": 0.0, "encoder": 0.0})
    asked = []

    def compiled(module, **options):
        asked.append(options)
        return module

    monkeypatch.setattr(torch, "compile", compiled)
    found, _ = run([group(SPEC)], [ENCODER])
    assert asked == [{}, {"mode": "reduce-overhead"}]
    for report in (0, 1):
        row = rows_of(found, report)["compile"]
        assert row.seconds.median == 1e-3
        assert row.error <= row.tolerance


def test_result_names():
    assert result_name(FakeGpu(), "op", "paper-f16") == f"cuda-h200-op-paper-f16-torch{TORCH}"


def test_compile_ahead_needs_a_gpu_target(tmp_path):
    with pytest.raises(TargetError, match="the target is not a GPU"):
        compile_ahead([], [], artifacts=tmp_path, target="cpu")


def test_failed_compilation_is_listed(monkeypatch, tmp_path):
    class Failing(FakePool):
        def __init__(self, folder, *_):
            super().__init__(folder)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def result(self, job):
            if job.softmax:
                raise RuntimeError("no nvcc\nmore")
            return compiled_path(job, self.folder)

    monkeypatch.setattr("dcnv3_tvm.bench.gpu_compilation.CompilePool", Failing)
    found = compile_ahead([group(SPEC)], [], artifacts=tmp_path, target="cuda-sm90")
    assert found.compiled == (SPEC.slug,)
    assert found.failed == {with_logits(SPEC).slug: "RuntimeError: no nvcc"}
    assert not found.ok
    assert "1 compiled for cuda-sm90" in report_text(found)

    copied = {path.name for path in (tmp_path / "runtime").iterdir()}
    assert copied == {"libtvm_runtime.so", "libtvm_runtime_cuda.so", "version.txt"}
    monkeypatch.setattr(library, "installed_runtime", lambda: None)
    with pytest.raises(MissingDependencyError, match="not installed, and not in"):
        load_kernel("dcnv3", tmp_path / "elsewhere" / "kernel.so", "cuda-sm90")


def test_compiled_code_is_measured_without_tvm():
    block = "import sys; sys.modules['tvm'] = None; "
    use = "from dcnv3_tvm import provenance; print(provenance.cpu_description())"
    command = [sys.executable, "-c", f"{block}import dcnv3_tvm.bench.gpu; {use}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == machine.cpu_name(), done.stderr


def test_command_without_a_gpu(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(gpu, "devices", lambda: ())
    monkeypatch.chdir(tmp_path)
    assert main(["bench", "gpu"]) == 2
    assert "this machine has no NVIDIA GPU" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_command(capsys, monkeypatch, tmp_path, run):
    asked = {}

    def pretend(groups, cases, **options):
        asked.update(options, groups=groups, cases=cases)
        return GpuRun(
            GpuBenchmark(run.device, run.pool, tmp_path, TimeBudget(1.0))._provenance,
            {},
            {"internimage_xl": "no time left"},
            12.0,
        )

    monkeypatch.setattr(gpu, "device", lambda _: None)
    monkeypatch.setattr("dcnv3_tvm.bench.gpu.run_gpu", pretend)
    arguments = ["--part", "op", "--case", "*c128*-f16", "--seconds", "60", "--device", "1"]
    assert main(["bench", "gpu", *arguments, "--results", str(tmp_path / "r")]) == 0
    assert "skipped internimage_xl: no time left" in capsys.readouterr().out
    assert (asked["seconds"], asked["index"], asked["cases"]) == (60.0, 1, [])
    assert asked["results"] == tmp_path / "r"
    assert asked["groups"][0].slug == "paper-f16"
    assert main(["bench", "gpu", "--case", "nothing"]) == 2
    assert "no case matches the pattern" in capsys.readouterr().err
