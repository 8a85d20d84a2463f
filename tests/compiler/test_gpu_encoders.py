"""Whole encoders on an emulated GPU against float64."""

import csv
import json
import re

import numpy as np
import pytest

from dcnv3_tvm import compile_artifact, frontend, gpu
from dcnv3_tvm.bench import gpu_accuracy
from dcnv3_tvm.bench.cases import encoder_case
from dcnv3_tvm.bench.gpu_accuracy import list_accuracy
from dcnv3_tvm.cli import main
from dcnv3_tvm.compiler.pipeline import run_pipeline
from dcnv3_tvm.targets import resolve_target
from dcnv3_tvm.verify.compare import difference, reference_outputs
from dcnv3_tvm.verify.random_weights import randomize_

PRE_NORM = "test_internimage_pre_norm"


def accuracy(variant, batch, size, dtype):
    case = encoder_case(variant, batch=batch, size=size, dtype=dtype)
    found = list_accuracy(case, "cuda-sm90", seed=1)
    assert [row.output.partition("/")[0] for row in found.rows] == ["main"] + 4 * ["features"]
    return found


def assert_agrees(variant, batch, size, dtype):
    found = accuracy(variant, batch, size, dtype)
    assert found.ok, found.cells()


def test_pre_norm():
    assert_agrees(PRE_NORM, 1, (64, 96), "float32")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("norm", "dtype"), [("res_post_norm", "float16"), ("post_norm", "bfloat16")]
)
def test_attention_pooling_and_center_feature_scale(norm, dtype):
    assert_agrees(f"test_internimage_{norm}", 1, (64, 96), dtype)


@pytest.mark.slow
def test_t():
    """In bfloat16 it has the same kernels, see `tests/transform/test_half_products.py`."""
    assert_agrees("internimage_t", 1, (64, 96), "float16")


@pytest.mark.slow
def test_any_batch_and_size(gpu, tmp_path, rng):
    model = randomize_(frontend.create_model(PRE_NORM), 1)
    dynamic = {"dynamic_batch": True, "dynamic_size": True}
    imported = frontend.import_model(model, example=(1, 3, 64, 96), **dynamic)
    _, schedules = run_pipeline(imported, resolve_target("cuda-sm90"), dtype="float16")
    stock = {name for name, found in schedules.items() if found.rule == "fallback"}
    assert stock
    assert all(re.search("cast|transpose|mean", name) for name in stock), stock
    with gpu.compiling():
        compile_artifact(imported, tmp_path / "model", target="cuda-sm90", dtype="float16")
    for shape in ((1, 3, 64, 96), (3, 3, 37, 75)):
        image = rng.standard_normal(shape).astype("float32")
        truth = reference_outputs(model, image)
        for entry, outputs in gpu.run_model(tmp_path / "model", [image]).items():
            for output, expected in zip(outputs, truth[entry], strict=True):
                assert difference(entry, output, expected).within("float16")


ARGUMENTS = ("bench", "gpu-accuracy", "--variant", PRE_NORM, "--size", "32")


def test_command(capsys, tmp_path):
    files = ["--json", str(tmp_path / "a.json"), "--csv", str(tmp_path / "a.csv")]
    assert main([*ARGUMENTS, "--target", "cuda-sm80", "--dtype", "bfloat16", *files]) == 0
    shown = capsys.readouterr().out
    for words in ("cuda-sm80", "main/logits", "features/", "agrees with float64", "error 0.01"):
        assert words in shown
    data = json.loads((tmp_path / "a.json").read_text())
    assert (data["kind"], data["target"]) == ("gpu-accuracy", "cuda-sm80")
    assert (data["measure"], data["tolerance"], data["ok"]) == ("norm", 1e-2, True)
    # Short products are seen.
    assert all(1e-4 < row["norm"] < 1e-2 for row in data["rows"])
    assert all(1e-3 < row["pytorch"] < 1e-1 for row in data["rows"])
    with (tmp_path / "a.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 5


def test_what_is_too_far_is_a_failure(capsys, monkeypatch):
    right = gpu_accuracy.EmulatedGpu.run_model

    def wrong(*arguments):
        outputs = right(*arguments)
        outputs["main"][2][0, 0, 0, 0] = np.nan
        return outputs

    monkeypatch.setattr(gpu_accuracy.EmulatedGpu, "run_model", wrong)
    assert main([*ARGUMENTS, "--features"]) == 1
    shown = capsys.readouterr().out
    assert shown.count("TOO FAR") == 1
    assert "DIFFERS from float64" in shown


def test_only_for_gpus(capsys):
    assert main([*ARGUMENTS, "--target", "cpu"]) == 2
    assert "the target is not a GPU" in capsys.readouterr().err


@pytest.mark.slow
def test_as_on_a_gpu_that_is_full(monkeypatch):
    """Both products of a block in one kernel, and DCNv3 with partners."""
    monkeypatch.setattr(gpu, "FULL_GPU_BLOCKS", 0)
    monkeypatch.setattr(gpu, "FULL_GPU_THREADS", 0)
    assert_agrees(PRE_NORM, 1, (64, 96), "float16")
