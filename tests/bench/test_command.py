"""``dcnv3-tvm bench``, on tiny cases."""

import csv
import dataclasses
import functools
import json

import pytest

from dcnv3_tvm.bench import measure, ours, runner
from dcnv3_tvm.bench.contestants import OURS
from dcnv3_tvm.bench.report import Report
from dcnv3_tvm.cli import main
from dcnv3_tvm.targets import has_bfloat16_dot, resolve_target

TINY = ("--variant", "test_internimage_pre_norm", "--against", "torch", "--rounds", "2")
CASE = "dcnv3-n1-h4-w4-c16-g4-k3-s1-p1-d1-f32"


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    quick = functools.partial(measure.measure, sleep=lambda _: None)
    monkeypatch.setattr(runner, "measure", quick)


def test_operator(capsys, tmp_path):
    arguments = ["--json", tmp_path / "r.json", "--csv", tmp_path / "r.csv", "--case", "*c16*"]
    assert main(["bench", "op", *TINY, *map(str, arguments)]) == 0
    shown = capsys.readouterr().out
    for words in (CASE, OURS, "torch", "floor: copy", "floor: arithmetic", "GFLOP/s", "load"):
        assert words in shown
    report = Report.from_json(json.loads((tmp_path / "r.json").read_text()))
    (case,) = report.cases
    assert [row.name for row in case.rows] == [OURS, f"{OURS} kernel", "torch"]
    assert all(row.seconds.best > 0 and row.ratio.median > 0 for row in case.rows)
    assert report.peaks.flops > 1e9
    assert report.peaks.bytes > 1e8
    with (tmp_path / "r.csv").open() as file:
        assert [row["case"] for row in csv.DictReader(file)] == [CASE] * 3


@pytest.mark.slow
def test_encoder_prints_json(capsys):
    assert main(["bench", "encoder", *TINY, "--batch", "2", "--size", "32x40", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["kind"] == "encoder"
    assert data["cases"][0]["slug"] == "test_internimage_pre_norm-n2-h32-w40-f32"
    assert [row["name"] for row in data["cases"][0]["rows"]] == [OURS, "torch"]
    assert not any(row["wrong"] for row in data["cases"][0]["rows"])


@pytest.mark.slow
@pytest.mark.skipif(
    not has_bfloat16_dot(resolve_target("auto")), reason="the processor multiplies no bfloat16"
)
def test_encoder_in_bfloat16(capsys):
    arguments = ["--dtype", "bfloat16", "--against", "openvino,openvino-bf16", "--json"]
    assert main(["bench", "encoder", *TINY[:2], "--rounds", "2", *arguments]) == 0
    (case,) = json.loads(capsys.readouterr().out)["cases"]
    assert case["slug"] == "test_internimage_pre_norm-n1-h32-w32-bf16"
    assert case["measure"] == "norm"
    errors = {row["name"]: row["error"] for row in case["rows"]}
    assert list(errors) == [OURS, "openvino", "openvino-bf16"]
    # Short products are seen.
    assert 1e-4 < errors[OURS] < 1e-2
    assert errors["openvino"] < 1e-5


def test_wrong_outputs_give_no_times(capsys, monkeypatch):
    right = ours.build

    def wrong(problem, threads):
        call, kernel = right(problem, threads)
        return [dataclasses.replace(call, outputs=lambda y: [1.01 * y]), kernel]

    monkeypatch.setattr(ours, "build", wrong)
    assert main(["bench", "op", *TINY, "--case", "*c16*"]) == 1
    shown = capsys.readouterr().out
    assert f"the outputs of {OURS} are not" in shown
    assert "not timed" in shown


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("op", "--against", "tensorrt"), "allowed: torch, compile, onnxruntime, "),
        (("op", "--threads", "0"), "--threads is out of range"),
        (("op", "--rounds", "-1"), "--rounds is out of range"),
        (("op", "--case", "x"), "no case matches the pattern"),
        (("op", "--variant", "internimage_u"), "Did you mean"),
        (("encoder", "--variant", "all"), "no model with this name"),
        (("encoder", "--against", "openvino-bf16"), "no such peer to measure against in float32"),
    ],
)
def test_bad_usage(capsys, arguments, words):
    assert main(["bench", *arguments]) == 2
    assert words in capsys.readouterr().err
