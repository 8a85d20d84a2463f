"""The command `visualize`: what it writes, and which options fit together."""

import re
from pathlib import Path

import PIL.Image
import pytest

from dcnv3_tvm.verify.compare import ReferenceOperator
from dcnv3_tvm.visualize import PICTURES

WEIGHTS = Path(__file__).resolve().parents[2] / "examples" / "digits_internimage.safetensors"


@pytest.fixture
def visualize(cli, photo, tmp_path):
    """Run the command on a photo; PyTorch models call the reference operator."""

    def call(model, name, *options):
        with ReferenceOperator():
            return cli("visualize", model, photo, "-o", tmp_path / name, *options)

    return call


def test_page_of_a_checkpoint(visualize, tmp_path):
    done = visualize(WEIGHTS, "page.html", "--size", "48x64", "--json")
    assert done.code == 0, done.err
    assert "visualize" in done.err, "no progress"
    assert done.data["files"] == [str(tmp_path / "page.html")]
    positions = [block["positions"] for block in done.data["blocks"]]
    assert positions == [[12, 16], [6, 8], [3, 4], [2, 2]]
    assert done.data["blocks"][0]["mean_offset"] > 0.5
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "<title>digits_internimage on china.jpg</title>" in page


@pytest.mark.slow
def test_folder_and_one_picture(visualize, tmp_path):
    assert visualize(WEIGHTS, "out").code == 0
    expected = {"page.html", *(f"{kind}.png" for kind in PICTURES)}
    assert {path.name for path in (tmp_path / "out").iterdir()} == expected
    options = ("--picture", "groups", "--block", "2.0", "--group", "5", "--at", "8,20")
    done = visualize(WEIGHTS, "one.png", *options)
    assert re.search(r"\n +2 +0 +2 x 2 +8 ", done.out), done.out
    assert PIL.Image.open(tmp_path / "one.png").height > 200


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["out", "--picture", "groups"], "a folder gets all pictures"),
        (["a.png", "--picture", "pie"], "'pie'; allowed: points, field"),
        (["a.png", "--block", "1.1"], r"got 1\.1; allowed: 0\.0 to 0\.0"),
        (["a.png", "--block", "1"], "stage.block such as 2.0"),
        (["a.png", "--at", "1"], "two numbers such as 112,80"),
        (["a.pdf"], r"unknown suffix; got --output .*a\.pdf; allowed: \.html"),
        (["out", "--group", "99"], "group is out of range"),
        (["missing/a.html"], "page cannot be written"),
        (["a.html", "--group", "1"], "choices of its own; got --group"),
        (["a.html", "--device", "cpu"], "--device is for artifacts"),
    ],
)
def test_wrong_options(options, message, visualize, tmp_path):
    done = visualize(WEIGHTS, *options)
    assert done.code == 2
    assert re.search(message, done.err)
    assert not list(tmp_path.glob(f"{options[0]}*"))


def test_artifact_without_offsets(visualize, artifact_path):
    done = visualize(artifact_path, "page.html", "--size", "9")
    assert (done.code, "this size; got 9x9; allowed: 8x8" in done.err) == (2, True)
    done = visualize(artifact_path, "page.html")
    assert done.code == 2
    assert "Compile with --expose offsets" in done.err
