"""Profiles of an artifact: the table, the picture and the trace."""

import dataclasses
import itertools
import json
import shutil
import sys

import numpy as np
import pytest

from dcnv3_tvm import frontend, runtime
from dcnv3_tvm.bench import cpu_peaks
from dcnv3_tvm.bench.roofline import Peaks
from dcnv3_tvm.compiler.compile import compile_artifact
from dcnv3_tvm.errors import InvalidArgumentError
from dcnv3_tvm.runtime import profile
from dcnv3_tvm.verify.random_weights import randomize_

pytestmark = pytest.mark.usefixtures("unoptimized")

SIDE = 32


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    """An encoder with a dynamic batch."""
    model = frontend.create_model("test_internimage_pre_norm", features_only=True)
    imported = frontend.import_model(
        randomize_(model, seed=0), example=(1, 3, SIDE, SIDE), dynamic_batch=True
    )
    path = tmp_path_factory.mktemp("profiled") / "artifact"
    compile_artifact(imported, path)
    return path


@pytest.fixture(autouse=True)
def _peaks(monkeypatch):
    monkeypatch.setattr(
        cpu_peaks, "measure_peaks", lambda _: Peaks(flops=1e12, bytes=1e11, how="made up")
    )


def test_profile_of_a_model(artifact):
    with runtime.load(artifact, threads=1) as model:
        image = np.random.default_rng(0).standard_normal((2, 3, SIDE, SIDE), np.float32)
        expected = model.features(image)
        found = model.profile(image, calls=3)
        assert (found.calls, found.threads) == (3, 1)
        assert {kernel.name for kernel in found.kernels} <= model.metadata.kernels.keys()
        assert len(found.timeline) == sum(kernel.calls for kernel in found.kernels)
        times = [kernel.seconds for kernel in found.kernels]
        assert times == sorted(times, reverse=True)
        assert min(times) > 0
        starts = [event.start for event in found.timeline]
        assert starts == sorted(starts)
        # The first kernels, by hand: a convolution with stride 2, of 3 channels to half of C.
        stem = next(kernel for kernel in found.kernels if kernel.name.startswith("convolution_3"))
        half = SIDE // 2
        shape = stem.shapes.rpartition(" -> ")[2]
        assert shape == f"2x{half}x{half}x{shape.rpartition('x')[2]}"
        outputs = 2 * half**2 * int(shape.rpartition("x")[2])
        assert stem.flops == 2 * outputs * 9 * 3
        sampling = next(kernel for kernel in found.kernels if kernel.name.startswith("dcnv3"))
        size = np.prod([int(number) for number in sampling.shapes.rpartition(" -> ")[2].split("x")])
        assert sampling.flops == 2 * 4 * 9 * size
        # The model is as before.
        for left, right in zip(model.features(image), expected, strict=True):
            np.testing.assert_array_equal(left, right)
        with pytest.raises(InvalidArgumentError, match="calls"):
            model.profile(image, calls=0)
        # Each call is a job of its own: other calls, forks and Ctrl-C wait for one only.
        jobs = []

        def run(job):
            jobs.append(job)
            return job(lambda: None, lambda _: None)

        profile.profile(run, model.metadata, calls=3, threads=1)
        assert len(jobs) == 2 + 3


def test_command(cli, artifact, photo, tmp_path):
    outcome = cli(
        *("profile", artifact, photo, "--calls", 2, "--json"),
        *("--plot", tmp_path / "bars.svg", "--trace", tmp_path / "trace.json"),
    )
    assert outcome.code == 0, outcome.err
    data = outcome.data
    for kernel in data["kernels"]:
        bound = max(kernel["flops"] / 1e12, kernel["bytes"] / 1e11)
        assert kernel["roofline_seconds"] == pytest.approx(kernel["calls"] * bound)
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert [event["ph"] for event in events] == ["X"] * sum(k["calls"] for k in data["kernels"])
    assert events[0]["ts"] == 0
    for before, after in itertools.pairwise(events):
        assert before["ts"] + before["dur"] <= after["ts"] + 1e-3
    assert data["kernels"][0]["name"] in (tmp_path / "bars.svg").read_text()
    text = cli("profile", artifact, photo, "--calls", 1).out
    assert "roofline, ms" in text
    assert "A call takes" in text


def test_without_the_compiler(cli, artifact, photo, monkeypatch):
    monkeypatch.setitem(sys.modules, "dcnv3_tvm.bench.cpu_peaks", None)
    outcome = cli("profile", artifact, photo, "--calls", 1)
    assert outcome.code == 0
    assert "without rooflines" in outcome.err
    assert "roofline" not in outcome.out


def test_artifact_without_operations(cli, artifact, photo, tmp_path):
    old = shutil.copytree(artifact, tmp_path / "old")
    metadata = dataclasses.replace(runtime.read_metadata(old), work={})
    (old / "metadata.json").write_text(metadata.dumps())
    outcome = cli("profile", old, photo, "--calls", 1)
    assert "the artifact is of an earlier version" in outcome.err
    assert "roofline" not in outcome.out


def test_errors(cli, artifact, photo, tmp_path):
    outcome = cli("profile", artifact)
    assert outcome.code == 2
    assert "dynamic, so an image has to be given" in outcome.err
    outcome = cli("profile", artifact, photo, "--calls", 1, "--trace", tmp_path / "no" / "t.json")
    assert outcome.code == 2
    assert "the trace cannot be written" in outcome.err
    assert "A call takes" in outcome.out, "what was measured is lost"
    model = runtime.load(artifact)
    model.device, model._execution = "cuda:0", object()  # Not a `CpuExecution`.
    with pytest.raises(InvalidArgumentError, match=r"on cuda:0.*nsys profile"):
        model.profile()
