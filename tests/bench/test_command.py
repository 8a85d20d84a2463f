"""``dcnv3-tvm bench`` on tiny cases."""

import functools
import json

import pytest

from dcnv3_tvm.bench import builders, comparison, measure
from dcnv3_tvm.bench.backends import OURS
from dcnv3_tvm.cli import main
from dcnv3_tvm.targets import has_fast_bfloat16, resolve_target

pytestmark = pytest.mark.usefixtures("unoptimized")

TINY = ("--variant", "test_internimage_pre_norm", "--against", "torch", "--rounds", "2")
CASE = "dcnv3-n1-h4-w4-c16-g4-k3-s1-p1-d1-f32"


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    quick = functools.partial(measure.measure, sleep=lambda _: None)
    monkeypatch.setattr(comparison, "measure", quick)


def test_operator(capsys, tmp_path):
    path = tmp_path / "r.json"
    assert main(["bench", "op", *TINY, "--json", str(path), "--case", "*c16*"]) == 0
    shown = capsys.readouterr().out
    for part in (CASE, OURS, "torch", "roofline: memory", "roofline: arithmetic", "GFLOP/s"):
        assert part in shown
    data = json.loads(path.read_text())
    (case,) = data["cases"]
    assert case["slug"] == CASE
    assert [row["name"] for row in case["rows"]] == [OURS, f"{OURS} kernel", "torch"]
    assert all(row["seconds"]["best"] > 0 and row["ratio"]["median"] > 0 for row in case["rows"])
    assert data["peaks"]["flops"] > 1e9
    assert data["peaks"]["bytes"] > 1e8


def test_gradients_of_the_operator(capsys):
    arguments = ["--backward", "--batch", "2", "--case", "*c16*", "--json"]
    assert main(["bench", "op", *TINY, *arguments]) == 0
    data = json.loads(capsys.readouterr().out)
    (case,) = data["cases"]
    assert data["kind"] == "op-backward"
    assert case["slug"] == "dcnv3-n2-h4-w4-c16-g4-k3-s1-p1-d1-f32-backward"
    assert [row["name"] for row in case["rows"]] == [OURS, "torch"]
    assert all(row["seconds"]["best"] > 0 and row["error"] < 1e-5 for row in case["rows"])


@pytest.mark.slow
def test_training_step(capsys):
    arguments = ["--variant", TINY[1], "--batch", "2", "--rounds", "2", "--json"]
    assert main(["bench", "train", *arguments]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["kind"] == "train"
    own, recomputing, torch = data["cases"][0]["rows"]
    assert own["seconds"]["best"] > 0
    assert recomputing["name"] == f"{OURS}, recomputing"
    # A Python process with PyTorch takes some 200 MB; the steps of a tiny model, little.
    assert all(100e6 < row["peak_bytes"] < 1e9 for row in (own, torch))


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
    not has_fast_bfloat16(resolve_target("auto")), reason="needs bfloat16 dot products"
)
def test_encoder_in_bfloat16(capsys):
    arguments = ["--dtype", "bfloat16", "--against", "openvino,openvino-bf16", "--json"]
    assert main(["bench", "encoder", *TINY[:2], "--rounds", "2", *arguments]) == 0
    (case,) = json.loads(capsys.readouterr().out)["cases"]
    assert case["slug"] == "test_internimage_pre_norm-n1-h32-w32-bf16"
    assert case["measure"] == "norm"
    errors = {row["name"]: row["error"] for row in case["rows"]}
    assert list(errors) == [OURS, "openvino", "openvino-bf16"]
    # The error shows that the matmuls are in bfloat16.
    assert 1e-4 < errors[OURS] < 1e-2
    assert errors["openvino"] < 1e-5


def test_wrong_outputs_prevent_timing(capsys, monkeypatch):
    build = builders._operator_runner

    def build_wrong(*arguments):
        return build(*arguments)._replace(outputs=lambda y: [1.01 * y])

    monkeypatch.setattr(builders, "_operator_runner", build_wrong)
    assert main(["bench", "op", *TINY, "--case", "*c16*", "--json"]) == 1
    (case,) = json.loads(capsys.readouterr().out)["cases"]
    assert [row["wrong"] for row in case["rows"]] == [True, False, False]
    assert all(row["seconds"] is None for row in case["rows"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("op", "--against", "tensorrt"), "allowed: torch, compile, onnxruntime, "),
        (("op", "--case", "x"), "no case matches the pattern"),
        (("op", "--variant", "internimage_u"), "Did you mean"),
        (("encoder", "--variant", "all"), "no model with this name"),
        (("encoder", "--against", "openvino-bf16"), "unknown backend for float32"),
        (("kernels", "--dtype", "float16"), "the CPU does not support the dtype"),
        (("kernels", "--device-model", "h300"), "unknown device model"),
    ],
)
def test_invalid_arguments(capsys, arguments, message):
    assert main(["bench", *arguments]) == 2
    assert message in capsys.readouterr().err
