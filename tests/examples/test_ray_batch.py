"""The Ray example: its class in this process, and the script on a local cluster."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import dcnv3_tvm
from dcnv3_tvm.runtime import top_k
from helpers.toy import Toy

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, make_image) -> Path:
    """Five images, one of them in a subfolder; a truncated one and one that is none."""
    folder = tmp_path_factory.mktemp("images")
    (folder / "sub").mkdir()
    for seed in range(4):
        (folder / f"{seed}.png").write_bytes(make_image(seed))
    (folder / "sub" / "4.jpg").write_bytes(make_image(4, kind="JPEG"))
    (folder / "broken.png").write_bytes(make_image(5)[:90])
    (folder / "text.jpg").write_text("no image")
    (folder / "notes.txt").write_text("left out")
    return folder


def test_classifier_returns_a_row_for_each_image(artifact, folder, monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import ray_batch

    paths = ray_batch.find_images(folder)
    assert len(paths) == 7
    columns = ray_batch.Classifier(str(artifact), top=3)({"path": np.array(paths)})
    assert all(len(column) == 7 for column in columns.values())
    model = dcnv3_tvm.load(artifact)
    for row, path in enumerate(paths):
        if path.endswith(("broken.png", "text.jpg")):
            assert "cannot be read" in columns["error"][row]
            assert columns["class_1"][row] == -1
            assert np.isnan(columns["probability_1"][row])
            continue
        assert columns["error"][row] == ""
        classes, probabilities = top_k(model(model.preprocess(path)), k=3)
        assert [columns[f"class_{rank}"][row] for rank in (1, 2, 3)] == classes[0].tolist()
        found = [columns[f"probability_{rank}"][row] for rank in (1, 2, 3)]
        assert found == probabilities[0].tolist()


def test_classifier_of_another_size(folder, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import ray_batch

    toy = Toy.build(sizes=((8, 8), (4, 16)))
    artifact = toy.write(tmp_path / "artifact")
    path = str(folder / "0.png")
    columns = ray_batch.Classifier(str(artifact), top=1, size=(4, 16))({"path": np.array([path])})
    image = dcnv3_tvm.load(artifact).preprocess(path, size=(4, 16))
    assert columns["class_1"].tolist() == [toy.main(image).argmax()]


@pytest.mark.slow
def test_script_on_a_local_cluster(artifact, folder, tmp_path):
    arguments = [artifact, folder, tmp_path / "out", "--format", "csv", "--workers", "2"]
    done = subprocess.run(
        [sys.executable, EXAMPLES / "ray_batch.py", *arguments],
        env={**os.environ, "RAY_AUTH_MODE": "disabled"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 1, done.stderr
    assert done.stdout.endswith("7 images, 2 failed\n")
    assert "broken.png: the image cannot be read" in done.stderr
    rows = [
        row
        for path in (tmp_path / "out").iterdir()
        for row in csv.DictReader(path.open(newline=""))
    ]
    assert len(rows) == 7
    model = dcnv3_tvm.load(artifact)
    for row in rows:
        if not row["error"]:
            classes, probabilities = top_k(model(model.preprocess(row["path"])))
            assert int(row["class_1"]) == classes[0, 0]
            assert float(row["probability_1"]) == pytest.approx(probabilities[0, 0])
    assert sum(bool(row["error"]) for row in rows) == 2
