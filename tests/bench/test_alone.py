"""Contestants in processes of their own."""

import json
import os

import numpy as np
import pytest

from dcnv3_tvm.bench.alone import AloneError, Task, run_alone
from dcnv3_tvm.bench.contestants import OURS
from dcnv3_tvm.bench.memory import MemoryListing, MemoryRow
from dcnv3_tvm.cli import main
from dcnv3_tvm.cli.bench_text import report_text
from dcnv3_tvm.provenance import Provenance
from helpers.toy import Toy

TINY = ("--variant", "test_internimage_pre_norm")


@pytest.fixture
def toy(tmp_path, rng):
    """Return a task on a toy's artifact, without a name, and the true output."""
    model = Toy.build()
    image = rng.standard_normal((1, 3, 8, 8)).astype(np.float32)
    np.savez(tmp_path / "inputs.npz", image=image)
    folder = model.write(tmp_path / "toy")

    def task(name, **settings):
        paths = (str(folder), str(tmp_path / "inputs.npz"), str(tmp_path / "outputs.npz"))
        return Task(name, OURS, *paths, threads=1, settings=settings)

    return task, model.main(image)


def test_peak_memory_is_of_a_process_without_compiler(toy):
    task, truth = toy
    answer = run_alone(task("peak_memory", calls=2))
    assert answer["imported"] == []
    # An interpreter with NumPy takes some 30 MB; PyTorch or TVM's compiler, 200.
    assert 10e6 < answer["bytes"] < 120e6
    with np.load(task("").outputs) as file:
        np.testing.assert_array_equal(file["arr_0"], truth)


def test_a_failing_process_says_why(toy):
    task = toy[0]("peak_memory", calls=1)
    gone = Task(**{**vars(task), "model": os.devnull})
    with pytest.raises(AloneError, match="ArtifactError"):
        run_alone(gone)


def test_environment_of_a_process(toy, monkeypatch):
    # With which Python does not start; an empty value takes it away.
    monkeypatch.setenv("PYTHONHOME", os.devnull)
    task = toy[0]("peak_memory", calls=1)
    with pytest.raises(AloneError, match="failed in a process of its own"):
        run_alone(task)
    assert run_alone(task, {"PYTHONHOME": ""})["bytes"]


def test_wrong_outputs_are_told_beside_the_memory():
    where = Provenance("CPU", 2, 2, 0.5, "2026-01-02T03:04:05+00:00", None, {"tvm": "0.27"})
    rows = (
        MemoryRow(OURS, 50_000_000, 1.0, 1e-6),
        MemoryRow("torch", 250_000_000, 5.0, 0.5, wrong=True),
        MemoryRow("openvino", failure="not installed: openvino"),
    )
    listing = MemoryListing("case", where, "how", rows)
    assert not listing.ok
    text = report_text(listing)
    for words in ("50.0", "5.00x", "5.0e-01 WRONG", "not installed: openvino", "how"):
        assert words in text
    assert MemoryListing("case", where, "how", (rows[0], rows[2])).ok
    lines = listing.to_csv().splitlines()
    assert len(lines) == 4
    assert lines[0].startswith("contestant,bytes,ratio,error,wrong,failure,case,date")


@pytest.mark.slow
def test_memory_of_an_encoder(capsys):
    names = ["torch", "onnxruntime", "onnxruntime-deform", "openvino"]
    assert main(["bench", "memory", *TINY, "--against", ",".join(names), "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["kind"] == "memory"
    assert [row["contestant"] for row in data["rows"]] == [OURS, *names]
    assert not any(row["wrong"] or row["failure"] for row in data["rows"])
    peaks = {row["contestant"]: row["bytes"] for row in data["rows"]}
    assert peaks["torch"] == max(peaks.values()) > 150e6
    # Neither holds PyTorch.
    assert max(peaks[OURS], peaks["onnxruntime"]) < 120e6
