"""Bundles: what is in them, and that they run with nothing else."""

import dataclasses
import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import dcnv3_tvm
from dcnv3_tvm import errors, files
from dcnv3_tvm.bundle import run, texts
from dcnv3_tvm.bundle.modules import runtime_modules
from dcnv3_tvm.bundle.write import write
from dcnv3_tvm.cli import main
from dcnv3_tvm.systems import SYSTEMS
from helpers.toy import Toy

LABELS = tuple(f"{number}. Größe" for number in range(192))


@pytest.fixture(scope="module")
def toy() -> Toy:
    return Toy.build()


@pytest.fixture
def artifact(toy: Toy, tmp_path: Path) -> Path:
    return toy.write(tmp_path / "model", labels=LABELS)


@pytest.fixture
def photo(tmp_path: Path, rng: np.random.Generator) -> Path:
    path = tmp_path / "photo.png"
    Image.fromarray(rng.integers(0, 256, (13, 21, 3), np.uint8)).save(path)
    return path


BLOCKED = """
import importlib.abc, runpy, sys

class Block(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"torch", "tvm", "safetensors", "rich", "shtab", "ml_dtypes"}:
            raise ImportError(f"{name} is blocked")

sys.meta_path.insert(0, Block())
script = sys.argv[1]
sys.argv = sys.argv[1:]
sys.path[0] = script.rpartition("/")[0]  # As Python does that runs the script.
try:
    runpy.run_path(script, run_name="__main__")
finally:
    ours = [m for name, m in sys.modules.items() if name.partition(".")[0] == "dcnv3_tvm"]
    assert all(m.__file__.startswith(sys.path[0]) for m in ours), "another dcnv3_tvm is imported"
"""


def test_runs_without_anything_else(artifact, photo, tmp_path):
    folder = tmp_path / "bundle"
    write(artifact, folder)
    for path in artifact.iterdir():
        path.unlink()
    command = [sys.executable, "-c", BLOCKED, str(folder / "run.py"), str(photo), "--json"]
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    model = dcnv3_tvm.load(folder / "artifact")
    logits = model(model.preprocess(photo))[0]
    order = np.argsort(-logits)[:5]
    found = json.loads(done.stdout)
    assert found["image"] == str(photo)
    assert [row["class"] for row in found["top"]] == order.tolist()
    assert [row["label"] for row in found["top"]] == [LABELS[number] for number in order]
    expected = np.exp(logits[order].astype(float)) / np.exp(logits.astype(float)).sum()
    assert [row["probability"] for row in found["top"]] == pytest.approx(expected.tolist())


def test_a_signal_ends_the_script(artifact, photo, tmp_path):
    """Also as the first process of a container, for which it has no effect by default."""
    write(artifact, tmp_path / "bundle")
    command = [sys.executable, str(tmp_path / "bundle" / "run.py"), *(3000 * [str(photo)])]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == f"{photo}\n"
        process.terminate()
        process.stdout.read()
    assert process.returncode == 143


def test_files(artifact, tmp_path):
    folder = tmp_path / "bundle"
    sizes = write(artifact, folder)
    found = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert found == {
        *(f"artifact/{path.name}" for path in artifact.iterdir()),
        *runtime_modules(),
        *("run.py", "requirements.txt", "Dockerfile", ".dockerignore", "README.md"),
        "dcnv3_tvm/LICENSE",
    }
    assert "Apache License" in (folder / "dcnv3_tvm" / "LICENSE").read_text()
    assert all(f"| `{name}` |" in (folder / "README.md").read_text() for name in sizes)
    assert sizes["dcnv3_tvm"] < 400e3
    total = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    assert sum(sizes.values()) == pytest.approx(total, rel=0.05)


def test_modules_are_of_the_runtime():
    names = set(runtime_modules())
    assert {"dcnv3_tvm/__init__.py", "dcnv3_tvm/runtime/image.py"} <= names
    folders = {name.rpartition("/")[0] for name in names}
    assert folders == {"dcnv3_tvm", "dcnv3_tvm/runtime", "dcnv3_tvm/tvm_workarounds"}
    # Also what is imported within functions, and nothing else of this folder.
    assert "dcnv3_tvm/tvm_workarounds/process.py" in names
    assert "dcnv3_tvm/tvm_workarounds/host_passes.py" not in names


def test_requirements_are_pinned_and_only_what_the_artifact_needs(toy):
    def names(**changes):
        lines = texts.requirements(dataclasses.replace(toy.metadata, **changes)).split()
        assert all("==" in line or line.startswith("nvidia") for line in lines)
        return [line.partition("=")[0] for line in lines]

    assert names() == ["apache-tvm-ffi", "numpy", "pillow"]
    assert names(preprocessing={}) == ["apache-tvm-ffi", "numpy"]
    entry = toy.metadata.entries["main"]
    output = dataclasses.replace(entry.outputs[0], dtype="bfloat16")
    entries = {"main": dataclasses.replace(entry, outputs=(output,))}
    assert "ml_dtypes" in names(entries=entries)
    target = dataclasses.replace(toy.metadata.target, kind="cuda")
    assert names(target=target)[-1].startswith("nvidia-cuda-runtime>")


def test_container(artifact, tmp_path):
    folder = tmp_path / "bundle"
    write(artifact, folder)
    lines = (folder / "Dockerfile").read_text().splitlines()
    assert lines[0] == f"FROM python:{sys.version_info.major}.{sys.version_info.minor}-slim"
    for line in lines:
        if line.startswith("COPY"):
            assert (folder / line.split()[1]).exists()
    assert json.loads(lines[-1].removeprefix("ENTRYPOINT "))[1] == "run.py"
    assert "docker build --platform linux/" in (folder / "README.md").read_text()


@pytest.mark.parametrize(
    ("system", "python", "run"),
    [
        ("macos-arm64", f"python{texts.PYTHON}", ".venv/bin/python"),
        ("windows-x86_64", f"py -{texts.PYTHON}", r".venv\Scripts\python"),
    ],
)
def test_other_systems(toy, tmp_path, system, python, run):
    target = dataclasses.replace(toy.metadata.target, triple=SYSTEMS[system].triple)
    library = {SYSTEMS[system].runtime_library: b"library"}
    toy.write(tmp_path / "model", runtime=library, target=target)
    write(tmp_path / "model", tmp_path / "bundle")
    readme = (tmp_path / "bundle" / "README.md").read_text()
    assert f"{python} -m venv .venv\n{run} -m pip" in readme
    assert f"{run} run.py photo.jpg" in readme
    assert "docker" not in readme
    assert not (tmp_path / "bundle" / "Dockerfile").exists()


def test_without_runtime_library(toy, tmp_path):
    toy.write(tmp_path / "model", runtime={})
    with pytest.raises(errors.ArtifactError, match="--runtime-wheel"):
        write(tmp_path / "model", tmp_path / "bundle")


def test_bundle_is_replaced_and_other_folders_are_not(artifact, tmp_path):
    folder = tmp_path / "bundle"
    write(artifact, folder)
    (folder / ".venv").mkdir()  # As the README says.
    (folder / "artifact" / "stale").touch()
    write(artifact, folder)
    assert not (folder / "artifact" / "stale").exists()
    (folder / "photo.jpg").touch()
    with pytest.raises(errors.ArtifactError, match=r"holds more than a bundle.*with photo\.jpg"):
        write(artifact, folder)
    with pytest.raises(errors.ArtifactError, match="not a bundle"):
        write(artifact, tmp_path)
    for inside in (artifact, artifact / "bundle"):
        with pytest.raises(errors.InvalidArgumentError, match="which the same call reads"):
            write(artifact, inside)


@pytest.mark.parametrize("name", ["model.so", "weights.safetensors", "libtvm_runtime.so"])
def test_damaged_artifact(artifact, tmp_path, name):
    with (artifact / name).open("ab") as file:
        file.write(b"x")
    with pytest.raises(errors.ArtifactError, match=f"{name} was modified"):
        write(artifact, tmp_path / "bundle")
    (artifact / name).unlink()
    with pytest.raises(errors.ArtifactError, match=f"it has no {name}"):
        write(artifact, tmp_path / "bundle")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_failing_write(artifact, tmp_path, monkeypatch):
    def full(path):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(files, "_flush", full)
    with pytest.raises(errors.ArtifactError, match="No space left"):
        write(artifact, tmp_path / "bundle")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_missing_package(artifact, tmp_path, monkeypatch):
    def missing(name):
        raise texts.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(texts.importlib.metadata, "version", missing)
    with pytest.raises(errors.MissingDependencyError, match="apache-tvm-ffi"):
        write(artifact, tmp_path / "bundle")


def test_command_line(artifact, tmp_path, capsys):
    folder = tmp_path / "bundle"
    assert main(["bundle", str(artifact), "-o", str(folder), "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["folder"] == str(folder)
    assert data["bytes"]["artifact/model.so"] == (artifact / "model.so").stat().st_size
    assert main(["bundle", str(artifact), "-o", str(folder)]) == 0
    assert f"python {folder / 'run.py'} photo.jpg" in capsys.readouterr().out
    assert main(["bundle", str(tmp_path), "-o", str(folder)]) == 2
    assert "not an artifact" in capsys.readouterr().err


@pytest.fixture
def script(artifact, tmp_path, monkeypatch):
    """The script in this process, with the artifact of a bundle."""
    write(artifact, tmp_path / "bundle")
    monkeypatch.setattr(run, "__file__", str(tmp_path / "bundle" / "run.py"))
    return run.main


def test_script_prints_classes(script, toy, tmp_path, capsys, rng):
    image = rng.standard_normal((1, 3, 8, 8)).astype(np.float32)
    np.save(tmp_path / "image.npy", image)
    assert script([str(tmp_path / "image.npy"), "--top", "2", "--threads", "1"]) == 0
    best = np.argsort(-toy.main(image)[0])[:2]
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("%  ")[1] for line in lines[1:]] == [LABELS[number] for number in best]


def test_script_takes_each_size(tmp_path, photo, monkeypatch, capsys, rng):
    toy = Toy.build(sizes=((8, 8), (4, 16)))
    write(toy.write(tmp_path / "artifact"), tmp_path / "bundle")
    monkeypatch.setattr(run, "__file__", str(tmp_path / "bundle" / "run.py"))
    model = dcnv3_tvm.load(tmp_path / "artifact")
    array = rng.standard_normal((1, 3, 4, 16)).astype(np.float32)
    np.save(tmp_path / "array.npy", array)
    for options, size in ([], (8, 8)), (["--size", "8"], (8, 8)), (["--size", "4x16"], (4, 16)):
        files = [str(photo), str(tmp_path / "array.npy")]
        assert run.main([*files, *options, "--top", "1", "--json"]) == 0
        best = [
            json.loads(line)["top"][0]["class"] for line in capsys.readouterr().out.split("\n")[:2]
        ]
        image = model.preprocess(photo, size=size)
        assert best == [toy.main(image)[0].argmax(), toy.main(array)[0].argmax()]
    assert run.main([str(photo), str(photo), "--size", "8x16"]) == 1
    shown = capsys.readouterr().err
    assert shown.count("got 8x16; allowed: 8x8, 4x16") == 1
    assert run.main([str(photo), "--size", "8x"]) == 1
    assert "got '8x'; allowed: height and width such as 384x640" in capsys.readouterr().err


def test_script_on_a_console_that_cannot_show_all_labels(script, photo, monkeypatch):
    shown = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", shown)
    assert script([str(photo), "--top", "1"]) == 0
    assert shown.buffer.getvalue().endswith(rb". Gr\xf6\xdfe" + b"\n")


def test_script_goes_on_after_an_error(script, photo, capsys):
    assert script(["none.jpg", str(photo), "--top", "1"]) == 1
    shown = capsys.readouterr()
    assert "none.jpg" in shown.err
    assert shown.out.startswith(f"{photo}\n")


def test_script_shows_each_image_of_an_array(tmp_path, monkeypatch, capsys, rng):
    toy = Toy.build(2)
    write(toy.write(tmp_path / "artifact"), tmp_path / "bundle")
    monkeypatch.setattr(run, "__file__", str(tmp_path / "bundle" / "run.py"))
    images = rng.standard_normal((2, 3, 8, 8)).astype(np.float32)
    np.save(tmp_path / "two.npy", images)
    assert run.main([str(tmp_path / "two.npy"), "--top", "1", "--json"]) == 0
    results = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [result["image"][-10:] for result in results] == ["two.npy[0]", "two.npy[1]"]
    assert [result["top"][0]["class"] for result in results] == toy.main(images).argmax(1).tolist()


def test_script_reports_errors(script, photo, tmp_path, capsys):
    (tmp_path / "text.npy").write_text("text")
    np.save(tmp_path / "wrong.npy", np.zeros((1, 3, 9, 9), np.float32))
    for arguments in (
        ["none.jpg"],
        ["none.npy"],
        [str(tmp_path / "text.npy")],
        [str(tmp_path / "wrong.npy")],
        [str(photo), "--top", "0"],
        [str(photo), "--threads", "0"],
    ):
        assert script(arguments) == 1, arguments
        shown = capsys.readouterr()
        assert shown.err.startswith("run.py: error: ")
        assert shown.out == ""


def test_script_shows_shapes_of_feature_maps(tmp_path, photo, monkeypatch, capsys):
    artifact = Toy.build(features_only=True).write(tmp_path / "features")
    write(artifact, tmp_path / "bundle")
    monkeypatch.setattr(run, "__file__", str(tmp_path / "bundle" / "run.py"))
    assert run.main([str(photo)]) == 0
    assert capsys.readouterr().out.splitlines()[1:] == [
        "feature_0 [1, 3, 8, 8]",
        "feature_1 [1, 3, 8, 8]",
    ]
