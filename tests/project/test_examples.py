"""Every example runs, with small inputs."""

import json
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

pytestmark = pytest.mark.usefixtures("unoptimized")

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"

TINY = "test_internimage_pre_norm"


@pytest.fixture
def run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[str, str]]:
    """Run an example in this process; return what it prints to stdout and stderr."""

    def call(name: str) -> tuple[str, str]:
        # From another folder: an example must not depend on the repository's root.
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [name, *ARGUMENTS[name]])
        code = None
        try:
            runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        except SystemExit as stop:
            code = stop.code
        shown = capsys.readouterr()
        assert not code, (code, shown.err)
        return shown.out, shown.err

    return call


ARGUMENTS = {
    "compile_and_run.py": ["--variant", TINY],
    "conv_bn_act.py": ["--steps", "3", "--size", "16"],
    "graph_operator.py": ["--size", "5"],
    "onnx_round_trip.py": ["--variant", TINY, "--size", "32"],
    "run_operator.py": ["--size", "7"],
    "tune_operator.py": ["work"],
}

TESTED_ELSEWHERE = [
    *("digits.py", "fine_tune.py", "train_digits.py", "visualize_digits.py"),
    *("compiler_step_by_step.py", "encoder_step_by_step.py", "operator_step_by_step.py"),
    *("make_notebooks.py", "ray_batch.py"),
]
"""By test_digits_examples.py, without compiling the trained models, by test_tutorial.py, and by
tests/examples/."""


def test_every_example_is_listed():
    assert sorted(path.name for path in EXAMPLES.glob("*.py")) == sorted(
        [*ARGUMENTS, *TESTED_ELSEWHERE]
    )


@pytest.mark.slow
def test_tuning_example(tmp_path: Path):
    # Its worker processes import the script that was started.
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / "tune_operator.py"), *ARGUMENTS["tune_operator.py"]],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    assert "record: hit" in done.stdout
    assert (tmp_path / "work" / "records" / "records.jsonl").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["graph_operator.py", "run_operator.py"])
def test_operator_examples(name: str, run: Callable[..., tuple[str, str]], tmp_path: Path):
    out, _ = run(name)
    assert "relative error" in out
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_compile_and_run(run: Callable[..., tuple[str, str]], tmp_path: Path):
    out, err = run("compile_and_run.py")
    assert "main/logits" in out
    assert "features/feature_3" in out
    assert "within the tolerance" in out
    assert "compile: import into Relax" in err, "no progress"
    assert "compile: schedule" in err, "no progress"
    metadata = json.loads((tmp_path / "build" / TINY / "metadata.json").read_text())
    assert metadata["name"] == TINY


@pytest.mark.slow
def test_onnx_round_trip(run: Callable[..., tuple[str, str]]):
    out, _ = run("onnx_round_trip.py")
    assert "4 DCNv3 operators" in out


@pytest.mark.slow
def test_conv_bn_act(run: Callable[..., tuple[str, str]]):
    out, _ = run("conv_bn_act.py")
    assert "step   2: loss" in out
    assert "% of the pixels of new images are right" in out
