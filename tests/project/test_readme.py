"""What the README shows can be typed."""

import re
import shlex
import shutil
from pathlib import Path

import pytest
from sklearn.datasets import load_sample_images

from dcnv3_tvm import cli

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")

TINY = "test_internimage_pre_norm"


def blocks(language: str, mark: str) -> str:
    """Find the one block of code that holds `mark`, and make it small."""
    found = re.findall(rf"^```{language}\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
    (block,) = (text for text in found if mark in text)
    small = block.replace("internimage_t", TINY).replace("224, 224", "32, 32")
    small = small.replace("--minutes 5", "--trials 45")
    assert isinstance(small, str)
    return small


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    shutil.copy(load_sample_images().filenames[0], tmp_path / "photo.jpg")
    return tmp_path


def test_operator_tour():
    names: dict[str, object] = {}
    exec(compile(blocks("python", "compile_op"), "README.md", "exec"), names)
    assert getattr(names["y"], "shape", None) == (1, 56, 56, 64)


@pytest.mark.slow
def test_model_tour(folder: Path):
    names: dict[str, object] = {}
    exec(compile(blocks("python", "compile_model"), "README.md", "exec"), names)
    assert getattr(names["logits"], "shape", None) == (1, 10)
    assert getattr(names["c5"], "shape", None) == (1, 64, 1, 1)
    assert {path.name for path in (folder / TINY).iterdir()} >= {"model.so", "metadata.json"}


@pytest.mark.slow
def test_command_line_tour(folder: Path, capsys: pytest.CaptureFixture[str]):
    lines = [
        shlex.split(line, comments=True) for line in blocks("sh", "dcnv3-tvm info").splitlines()
    ]
    # A benchmark takes minutes, and a worker serves until it is interrupted.
    assert {line[1] for line in lines} == set(cli._VERBS) - {"bench", "worker"}
    for line in lines:
        assert line[0] == "dcnv3-tvm"
        assert cli.main(line[1:]) == 0, capsys.readouterr().err
        assert capsys.readouterr().out
    assert (folder / "maps.npz").is_file()


def test_links_and_files_exist():
    targets = re.findall(r"\]\(([^)#]+)\)", README)
    local = [target for target in targets if "://" not in target]
    assert "CONTRIBUTING.md" in local
    for target in [*local, *re.findall(r"`((?:dcnv3_tvm|examples)/\S+?\.py)`", README)]:
        assert (ROOT / target).is_file(), target


def test_make_commands_exist():
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    commands = re.findall(r"^make (\w+)", README, re.MULTILINE)
    assert {"demo", "test"} <= set(commands) <= set(targets)
