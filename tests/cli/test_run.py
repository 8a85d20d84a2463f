"""``run``: on one image, and on many."""

import json

import numpy as np
import pytest
from PIL import Image

from dcnv3_tvm import runtime
from helpers.toy import Toy


def test_run_prints_the_most_probable_classes(cli, toy, artifact_path, photo):
    found = cli("run", artifact_path, photo, "--top", 3, "--json")
    assert found.code == 0
    assert found.err == ""
    batch = runtime.preprocess(photo, toy.metadata.preprocessing)
    classes, probabilities = runtime.top_k(toy.main(batch), k=3)
    assert [row["class"] for row in found.data["top"]] == classes[0].tolist()
    np.testing.assert_allclose([row["probability"] for row in found.data["top"]], probabilities[0])
    text = cli("run", artifact_path, photo)
    assert str(classes[0, 0]) in text.out.splitlines()[1]
    assert len(text.out.splitlines()) == 6


def test_run_saves_features(cli, toy, artifact_path, photo, tmp_path):
    target = tmp_path / "maps.npz"
    found = cli("run", artifact_path, photo, "--features", target, "--json")
    assert found.code == 0
    assert found.data["features"]["feature_1"] == [1, 3, 8, 8]
    batch = runtime.preprocess(photo, toy.metadata.preprocessing)
    with np.load(target) as maps:
        assert set(maps) == {"feature_0", "feature_1"}
        np.testing.assert_array_equal(maps["feature_1"], np.maximum(batch, 0))
    assert cli("run", artifact_path, photo, "--features", tmp_path / "bare").code == 0
    assert (tmp_path / "bare.npz").exists()
    (tmp_path / "file").write_text("")
    assert cli("run", artifact_path, photo, "--features", tmp_path / "file" / "x.npz").code == 2


def test_run_times(cli, artifact_path, photo):
    found = cli("run", artifact_path, photo, "--repeat", 5, "--threads", 1, "--json")
    times = found.data["milliseconds"]
    assert 0 < times["lower_quartile"] <= times["median"] <= times["upper_quartile"]
    assert (times["calls"], times["threads"]) == (5, 1)
    assert "ms median" in cli("run", artifact_path, photo, "--repeat", 1).out


@pytest.fixture(scope="module")
def photos(photo, tmp_path_factory):
    """A folder with five images, one of them damaged, and a text file."""
    folder = tmp_path_factory.mktemp("photos")
    (folder / "more").mkdir()
    for number, name in enumerate(("a.jpg", "b.JPG", "c.png", "more/a.jpg")):
        Image.open(photo).rotate(90 * number).save(folder / name)
    (folder / "d.png").write_text("damaged")
    (folder / "notes.txt").write_text("")
    return folder


@pytest.mark.parametrize("batch", [3, "n"])
def test_run_on_a_folder(cli, photos, tmp_path, batch):
    artifact = Toy.build(batch).write(tmp_path / "artifact")
    options = ["--batch", 2] if batch == "n" else []
    found = cli("run", artifact, photos, photos / "a.jpg", *options, "--top", 2, "--json")
    assert found.code == 1
    assert f"{photos}/d.png: the image cannot be read" in found.err
    assert "5 of 5" in found.err
    rows = [json.loads(line) for line in found.out.splitlines()]
    names = ("a.jpg", "b.JPG", "c.png", "more/a.jpg")
    assert [row["image"] for row in rows] == [str(photos / name) for name in names]
    one_by_one = [cli("run", artifact, row["image"], "--top", 2, "--json").data for row in rows]
    assert [row["top"] for row in rows] == [one["top"] for one in one_by_one]


def test_run_on_a_folder_is_resumed(cli, toy, artifact_path, photos, tmp_path):
    lines, folder = tmp_path / "results.jsonl", tmp_path / "maps"
    command = ("run", artifact_path, photos, "--skip-existing")
    assert cli(*command[:-1], "-o", lines).code == 1
    complete = lines.read_text()
    # A killed run leaves complete lines, and an incomplete one.
    lines.write_text(complete[: len(complete) // 2])
    left = complete[: len(complete) // 2].count("\n")
    found = cli(*command, "-o", lines, "--json").data
    assert (found["images"], found["skipped"], len(found["failed"])) == (5 - left, left, 1)
    assert lines.read_text() == complete

    assert cli(*command, "--features", folder).code == 1
    maps = sorted(str(path.relative_to(folder)) for path in folder.rglob("*.npz"))
    assert maps == ["a.jpg.npz", "b.JPG.npz", "c.png.npz", "more/a.jpg.npz"]
    with np.load(folder / "b.JPG.npz") as found:
        batch = runtime.preprocess(photos / "b.JPG", toy.metadata.preprocessing)
        np.testing.assert_array_equal(found["feature_1"], np.maximum(batch, 0))
    (folder / "c.png.npz").unlink()
    assert cli(*command, "--features", folder, "--json").data["skipped"] == 3


def test_run_on_many_images_rejects_bad_usage(cli, artifact_path, photos, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "other.jsonl").write_text("[1]\n")
    for arguments, message in (
        ([tmp_path / "empty"], "contain no images"),
        ([photos, "--features", "x.npz"], "do not go into one such file"),
        ([photos, "--output", photos / "a.jpg"], "cannot be written"),
        ([photos, "--output", tmp_path / "other.jsonl", "--skip-existing"], "is not one"),
        ([photos, "--skip-existing"], "needs results"),
        ([photos, "--batch", 2], "another batch size"),
        ([photos, "--repeat", 2], "takes one image"),
        ([photos / "a.jpg", "--value-range", "1,1"], "such as 0,1"),
    ):
        found = cli("run", artifact_path, *arguments)
        assert found.code == 2, found
        assert message in found.err


@pytest.mark.parametrize("option", ["--output", "--features"])
def test_run_does_not_write_into_the_artifact(cli, artifact_path, photos, option):
    outcome = cli("run", artifact_path, photos, option, artifact_path / "results")
    assert outcome.code == 2
    assert "which the same call reads or replaces" in outcome.err
    assert not (artifact_path / "results").exists()


def test_run_takes_the_range_of_float_images(cli, artifact_path, tmp_path):
    path = tmp_path / "depth.tif"
    Image.fromarray(np.ones((9, 9), np.float32)).save(path)
    found = cli("run", artifact_path, path)
    assert found.code == 2
    assert "Pass --value-range" in found.err
    assert cli("run", artifact_path, path, "--value-range", "0,1").code == 0


def test_run_without_logits(cli, tmp_path, photo):
    path = Toy.build(2, features_only=True).write(tmp_path / "maps")
    found = cli("run", path, photo, "--json")
    assert found.data["outputs"] == {"feature_0": [1, 3, 8, 8], "feature_1": [1, 3, 8, 8]}
