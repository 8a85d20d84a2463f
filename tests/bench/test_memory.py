"""Peak memory of backends in processes of their own."""

import json
import os
import types

import numpy as np
import pytest

from dcnv3_tvm.bench import memory
from dcnv3_tvm.bench.backends import OURS, UNTUNED, Peer
from dcnv3_tvm.bench.memory import MemoryListing, MemoryRow
from dcnv3_tvm.bench.memory_worker import MemoryTask, WorkerError, run_worker
from dcnv3_tvm.cli import main
from dcnv3_tvm.cli.bench_text import report_text
from dcnv3_tvm.provenance import Provenance
from helpers.toy import Toy

pytestmark = pytest.mark.usefixtures("unoptimized")

TINY = ("--variant", "test_internimage_pre_norm")


@pytest.mark.parametrize("backend", [OURS, UNTUNED])
def test_worker_imports_no_compiler(tmp_path, rng, backend):
    model = Toy.build()
    image = rng.standard_normal((1, 3, 8, 8)).astype(np.float32)
    np.savez(tmp_path / "inputs.npz", image=image)
    outputs = tmp_path / "outputs.npz"
    paths = map(str, (model.write(tmp_path / "toy"), tmp_path / "inputs.npz", outputs))
    result = run_worker(MemoryTask(backend, *paths, threads=1, calls=2))
    assert result["imported"] == []
    # An interpreter with NumPy takes some 30 MB; PyTorch or TVM's compiler, 200.
    assert 10e6 < result["bytes"] < 120e6
    with np.load(outputs) as file:
        np.testing.assert_array_equal(file["arr_0"], model.main(image))


def test_untuned_artifact_is_compiled_without_records(monkeypatch, tmp_path):
    asked = {}

    def compile_artifact(_, path, **options):
        asked[path.name] = options["database"]

    monkeypatch.setattr(memory, "compile_artifact", compile_artifact)
    monkeypatch.setattr(memory.frontend, "import_model", lambda *_, **__: None)
    image = np.zeros((1, 3, 8, 8), np.float32)
    problem = types.SimpleNamespace(source=None, inputs={"image": image}, dtype="float32")
    for name in (OURS, UNTUNED):
        assert memory._model(Peer(name), problem, tmp_path) == tmp_path / name
    assert asked == {OURS: "default", UNTUNED: "none"}


def test_failing_worker_reports_its_error(tmp_path):
    np.savez(tmp_path / "inputs.npz", image=np.zeros(1))
    task = MemoryTask(OURS, os.devnull, str(tmp_path / "inputs.npz"), "", threads=1, calls=1)
    with pytest.raises(WorkerError, match="ArtifactError"):
        run_worker(task)


def test_wrong_outputs_are_marked():
    where = Provenance("CPU", 2, 2, 0.5, "2026-01-02T03:04:05+00:00", None, {"tvm": "0.27"})
    rows = (
        MemoryRow(OURS, 50_000_000, 1.0, 1e-6),
        MemoryRow("torch", 250_000_000, 5.0, 0.5, wrong=True),
        MemoryRow("openvino", failure="not installed: openvino"),
    )
    listing = MemoryListing("case", where, "how", rows)
    assert not listing.ok
    text = report_text(listing)
    for part in ("50.0", "5.00x", "5.0e-01 WRONG", "not installed: openvino", "how"):
        assert part in text
    assert MemoryListing("case", where, "how", (rows[0], rows[2])).ok


@pytest.mark.slow
def test_memory_of_an_encoder(capsys):
    names = ["torch", "onnxruntime", "openvino"]
    assert main(["bench", "memory", *TINY, "--against", ",".join(names), "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["kind"] == "memory"
    assert [row["backend"] for row in data["rows"]] == [OURS, *names]
    assert not any(row["wrong"] or row["failure"] for row in data["rows"])
    peaks = {row["backend"]: row["bytes"] for row in data["rows"]}
    assert peaks["torch"] == max(peaks.values()) > 150e6
    # These do not import PyTorch.
    assert max(peaks[OURS], peaks["onnxruntime"]) < 120e6
