"""Compile, verify, inspect and run a model with the command line."""

import contextlib
import io
import json
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest

from dcnv3_tvm import runtime
from dcnv3_tvm.cli import main
from dcnv3_tvm.errors import InvalidArgumentError
from dcnv3_tvm.verify import compare

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("unoptimized")]

MODEL = "test_internimage_pre_norm"
LABELS = [f"{number}. Größe" for number in range(10)]


@pytest.fixture(scope="module")
def compilation(tmp_path_factory):
    """The folder with artifact and dump, stdout, and stderr."""
    folder = tmp_path_factory.mktemp("classifier")
    out, err = io.StringIO(), io.StringIO()
    (folder / "labels.txt").write_text("\n".join(LABELS), encoding="utf-8")
    options = ["--random-weights", "3", "--json", "--debug-dump", str(folder / "dump")]
    options += ["--labels", str(folder / "labels.txt")]
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        assert main(["compile", MODEL, *options, "-o", str(folder / "artifact")]) == 0
    return folder, out.getvalue(), err.getvalue()


@pytest.fixture
def classifier(compilation):
    return compilation[0] / "artifact"


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    path = tmp_path_factory.mktemp("encoder") / "artifact"
    options = ["--features-only", "--dynamic-batch", "--size", "64x96", "--random-weights", "4"]
    options += ["--dynamic-size", "32"]
    assert main(["compile", "test_internimage_post_norm_scale", *options, "-o", str(path)]) == 0
    return path


def test_compile_output(compilation):
    folder, out, err = compilation
    data = json.loads(out)
    assert data["name"] == MODEL
    assert set(data["entries"]) == {"main", "features"}
    assert data["bytes"] > 1e6
    assert "schedule" in err
    assert f"compile {MODEL}: done" in err
    assert len(list((folder / "dump").iterdir())) > 3
    assert {path.name for path in folder.iterdir()} == {
        "artifact",
        "dump",
        "labels.txt",
    }


def test_verify(cli, classifier, photo):
    found = cli("verify", classifier, "--random-weights", 3, photo, "--json")
    assert found.code == 0
    assert found.data["ok"]
    inputs = {row["input"] for row in found.data["outputs"]}
    assert inputs == {"random image 1x3x32x32 float32", "china.jpg"}
    assert len(found.data["outputs"]) == 2 * 5
    assert all(0 < row["mean_error"] <= row["max_error"] < 1e-4 for row in found.data["outputs"])


def test_verify_record(cli, classifier, tmp_path):
    folder = shutil.copytree(classifier, tmp_path / "copy")
    described = cli("info", folder).out
    assert "verify --record" in described
    assert "random weights (seed 3)" in described
    assert "random weights (seed 3)" in (folder / "README.md").read_text()
    assert cli("verify", folder, "--random-weights", 3, "--record").code == 0
    metadata = runtime.load(folder).metadata
    assert metadata.verification["ok"]
    assert len(metadata.verification["outputs"]) == 5
    assert "agrees with PyTorch in float64" in cli("info", folder).out


def test_verify_with_other_weights(cli, classifier):
    found = cli("verify", classifier, "--random-weights", 2)
    assert found.code == 1
    assert "DIFFERS" in found.out


def test_verify_uses_the_reference_operator(monkeypatch):
    from dcnv3_tvm.frontend import create_model

    calls = []

    def count(x, *arguments):
        calls.append(arguments[-1])
        return np.zeros(x.shape)

    monkeypatch.setattr(compare, "dcnv3_reference", count)
    compare.reference_outputs(create_model(MODEL), np.zeros((1, 3, 32, 32), np.float32))
    assert len(calls) == 2 * 4  # Four blocks, for logits and for features.
    assert {spec.dtype for spec in calls} == {"float64"}


def test_run(cli, classifier, photo, tmp_path):
    found = cli("run", classifier, photo, "--top", 3, "--json")
    assert found.code == 0
    assert [row["label"] for row in found.data["top"]] == [
        LABELS[row["class"]] for row in found.data["top"]
    ]
    assert len(found.data["top"]) == 3
    assert found.data["top"][0]["label"] in cli("run", classifier, photo).out
    assert "10: 0. Größe, 1. Größe" in cli("info", classifier).out
    assert cli("run", classifier, photo, "--features", tmp_path / "maps.npz").code == 0
    with np.load(tmp_path / "maps.npz") as maps:
        assert [maps[name].shape for name in sorted(maps)] == [
            (1, 8, 8, 8),
            (1, 16, 4, 4),
            (1, 32, 2, 2),
            (1, 64, 1, 1),
        ]


def test_encoder(cli, encoder, photo):
    found = cli("verify", encoder, photo, "--random-weights", 4, "--json")
    assert found.code == 0, found.data
    assert {row["output"] for row in found.data["outputs"]} == {
        f"main/feature_{index}" for index in range(4)
    }
    model = runtime.load(encoder)
    batch = model.preprocess([photo, photo, photo])
    assert batch.shape == (3, 3, 64, 96)
    maps = model.features(batch)
    assert [array.shape for array in maps] == [
        (3, 8, 16, 24),
        (3, 16, 8, 12),
        (3, 32, 4, 6),
        (3, 64, 2, 3),
    ]
    with pytest.raises(InvalidArgumentError, match="not a multiple of 32"):
        model.features(batch[:, :, :40])
    assert "image: NCHW (n, 3, 32*h, 32*w) float32" in cli("info", encoder).out
    np.testing.assert_array_equal(maps[3][0], maps[3][2])
    np.testing.assert_array_equal(maps[1][0], model.features(batch[:1])[1][0])


def test_checkpoint_named_after_the_model(cli, classifier, photo, tmp_path):
    from safetensors.torch import save_file

    from dcnv3_tvm.frontend import create_model
    from dcnv3_tvm.verify.random_weights import randomize_

    checkpoint = tmp_path / f"{MODEL}_tiny_32.safetensors"
    save_file(randomize_(create_model(MODEL), 3).state_dict(), checkpoint)
    found = cli("verify", classifier, photo, "--checkpoint", checkpoint)
    assert found.code == 0
    (tmp_path / f"{MODEL}_broken.safetensors").write_bytes(b"not a checkpoint")
    broken = tmp_path / f"{MODEL}_broken.safetensors"
    found = cli("compile", broken, "-o", tmp_path / "x")
    assert found.code == 2
    assert not (tmp_path / "x").exists()


def test_interrupted_compile_writes_nothing(tmp_path):
    options = ["--random-weights", "0", "-o", str(tmp_path / "x")]
    process = subprocess.Popen(
        [sys.executable, "-m", "dcnv3_tvm", "compile", MODEL, *options],
        stderr=subprocess.PIPE,
        text=True,
        # Background jobs of a shell ignore SIGINT.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stderr is not None
    for line in process.stderr:
        if line.rstrip().endswith("fold_weights"):
            process.send_signal(signal.SIGINT)
            break
    _, rest = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "interrupted" in rest
    assert "Traceback" not in rest
    assert not list(tmp_path.iterdir())
