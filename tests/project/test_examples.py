"""Every example runs, with small inputs."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"

TINY = "test_internimage_pre_norm"


def run(name: str, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    # From another folder: an example must not depend on the repository's root.
    return subprocess.run(
        [sys.executable, str(EXAMPLES / name), *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=240,
    )


ARGUMENTS = {
    "compile_and_run.py": ["--variant", TINY],
    "conv_bn_act.py": ["--steps", "3", "--size", "16"],
    "graph_operator.py": ["--size", "5"],
    "onnx_round_trip.py": ["--variant", TINY, "--size", "32"],
    "run_operator.py": ["--size", "7"],
    "tune_operator.py": [],
}


def test_every_example_is_listed():
    assert sorted(path.name for path in EXAMPLES.glob("*.py")) == sorted(ARGUMENTS)


@pytest.mark.slow
def test_tuning_example(tmp_path: Path):
    done = run("tune_operator.py", str(tmp_path / "work"), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "record: hit" in done.stdout
    assert (tmp_path / "work" / "records" / "records.jsonl").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["graph_operator.py", "run_operator.py"])
def test_operator_examples(name: str, tmp_path: Path):
    done = run(name, *ARGUMENTS[name], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "relative error" in done.stdout
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_compile_and_run(tmp_path: Path):
    done = run("compile_and_run.py", *ARGUMENTS["compile_and_run.py"], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "main/logits" in done.stdout
    assert "features/feature_3" in done.stdout
    assert "within the tolerance" in done.stdout
    assert "compile: schedule" in done.stderr, "no progress"
    metadata = json.loads((tmp_path / "build" / TINY / "metadata.json").read_text())
    assert metadata["name"] == TINY


@pytest.mark.slow
def test_onnx_round_trip(tmp_path: Path):
    done = run("onnx_round_trip.py", *ARGUMENTS["onnx_round_trip.py"], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "5 DCNv3 operators" in done.stdout


@pytest.mark.slow
def test_conv_bn_act(tmp_path: Path):
    done = run("conv_bn_act.py", *ARGUMENTS["conv_bn_act.py"], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "step   2: loss" in done.stdout
    assert "% of the pixels of new images are right" in done.stdout
