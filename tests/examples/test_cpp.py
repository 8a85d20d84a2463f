"""The C++ example: what it computes, and what it rejects."""

import dataclasses
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_images

import dcnv3_tvm
from dcnv3_tvm import frontend, machine, runtime
from dcnv3_tvm.digests import PART, digest_of_file
from dcnv3_tvm.runtime import library, metadata
from dcnv3_tvm.runtime.loading import read_metadata
from dcnv3_tvm.signature import size_name
from helpers.toy import Toy

pytestmark = pytest.mark.slow

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
SOURCES = EXAMPLES / "cpp"
LABELS = tuple(f"{number}. Größe" for number in range(192))


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the example as its README does; in one piece and unoptimised, to save time."""
    folder = tmp_path_factory.mktemp("cpp")
    search = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
    cmake = shutil.which("cmake", path=search)
    assert cmake, "cmake is not installed"
    options = [f"-DPython3_EXECUTABLE={sys.executable}", "-DCMAKE_CXX_FLAGS=-Werror"]
    options += ["-DCMAKE_BUILD_TYPE=Debug", "-DCMAKE_UNITY_BUILD=ON"]
    for command in ([cmake, "-S", SOURCES, "-B", folder, *options], [cmake, "--build", folder]):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    return folder / "run_artifact"


@pytest.fixture(scope="module")
def toy() -> Toy:
    return Toy.build("n")


@pytest.fixture
def artifact(toy: Toy, tmp_path: Path) -> Path:
    return toy.write(tmp_path / "artifact", labels=LABELS)


@pytest.fixture
def call(program: Path, tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        command = [program, *map(str, arguments), "--threads", "1"]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)

    return run


def check_same(call, artifact: Path, image: Path, size: tuple[int, int] | None = None) -> None:
    """Compare input, logits and classes with those of Python, bit for bit."""
    model = dcnv3_tvm.load(artifact)
    expected = model.preprocess(image, size=size)
    options = [] if size is None else ["--size", size_name(size)]
    done = call(artifact, image, *options, "--save-input", "input.f32", "--output", "logits.f32")
    assert done.returncode == 0, done.stderr
    folder = image.parent
    assert (folder / "input.f32").read_bytes() == expected.tobytes()
    logits = model(expected)
    assert (folder / "logits.f32").read_bytes() == logits.tobytes()
    names, probabilities = runtime.top_k(logits, labels=model.metadata.labels)
    rows = zip(names[0], probabilities[0], strict=True)
    assert done.stdout.splitlines() == [f"{100 * p:6.2f} %  {name}" for name, p in rows]


def photo(folder: Path, size: tuple[int, int] | None = None) -> Path:
    image = Image.open(load_sample_images().filenames[0])
    image = image if size is None else image.resize(size)
    image.save(folder / "photo.ppm")
    return folder / "photo.ppm"


@pytest.mark.parametrize("size", [(31, 60), (5, 3), (900, 40), (8, 8), (13, 8)])
def test_same_as_python(call, artifact, tmp_path, size):
    check_same(call, artifact, photo(tmp_path, size))


def test_several_sizes(call, tmp_path, rng):
    toy = Toy.build("n", sizes=((8, 8), (4, 16)))
    artifact = toy.write(tmp_path / "artifact", labels=LABELS)
    for size in (None, (8, 8), (4, 16)):
        check_same(call, artifact, photo(tmp_path, (31, 20)), size)
    done = call(artifact, "photo.ppm", "--size", "4x8")
    assert done.returncode == 1
    assert "does not take images of 4x8, but of 8x8, 4x16" in done.stderr
    for text in ("8x", "8x8x8", "0"):
        assert "a size such as 384x640 or 224 is needed" in call("a", "b", "--size", text).stderr
    values = rng.standard_normal((1, 3, 4, 16)).astype(np.float32)
    values.tofile(tmp_path / "values.f32")
    done = call(artifact, "values.f32", "--size", "4x16", "--output", "logits.f32")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "logits.f32").read_bytes() == toy.main(values).tobytes()
    assert "add --size" in call(artifact, "values.f32").stderr


def levels(artifact: Path, found: Path, image: Path) -> np.ndarray:
    """Return how much an input differs from Python's, in levels of 8-bit pixels."""
    model = dcnv3_tvm.load(artifact)
    values = np.fromfile(found, np.float32).reshape(3, -1)
    difference = np.abs(values - model.preprocess(image).reshape(3, -1))
    std = np.array(model.metadata.preprocessing["std"], np.float32)
    return np.rint(difference * 255 * std[:, None])


def test_tall_image(call, artifact, tmp_path):
    """Pillow 13 resizes the columns of tall images first, and rounds differently then."""
    image = photo(tmp_path, (31, 200))
    done = call(artifact, image, "--save-input", "input.f32")
    assert done.returncode == 0, done.stderr
    difference = levels(artifact, tmp_path / "input.f32", image)
    assert difference.max() <= 4
    assert difference.mean() < 0.3


def test_trained_model(call, tmp_path):
    """As a user would: the digits model, compiled with all optimisations, on a photograph."""
    weights = EXAMPLES / "digits_internimage.safetensors"
    model = frontend.create_model("digits_internimage", checkpoint=weights)
    names = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
    imported = frontend.import_model(model, example=(1, 3, 32, 32), labels=names)
    dcnv3_tvm.compile_model(imported).save(tmp_path / "artifact")
    check_same(call, tmp_path / "artifact", photo(tmp_path))


def test_input_of_a_file(call, artifact, toy, tmp_path, rng):
    values = rng.standard_normal((1, 3, 8, 8)).astype(np.float32)
    values.tofile(tmp_path / "values.f32")
    done = call(artifact, "values.f32", "--output", "logits.f32", "--trust-weights", "--top", "1")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "logits.f32").read_bytes() == toy.main(values).tobytes()
    assert len(done.stdout.splitlines()) == 1


def test_features(call, tmp_path):
    artifact = Toy.build(features_only=True).write(tmp_path / "artifact")
    done = call(artifact, photo(tmp_path))
    assert done.returncode == 0, done.stderr
    assert [line.split(":")[1] for line in done.stdout.splitlines()] == [" 1 3 8 8"] * 2


@pytest.mark.parametrize("name", ["photo.jpg", "photo.png"])
def test_jpeg_and_png(call, artifact, tmp_path, program, name):
    """With stb_image within one level of Pillow, whose decoder rounds differently."""
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    Image.open(photo(tmp_path)).save(tmp_path / name, quality=95, exif=exif)
    done = call(artifact, name, "--save-input", "input.f32")
    if re.search(r"STB_INCLUDE_DIR\S*NOTFOUND", (program.parent / "CMakeCache.txt").read_text()):
        assert done.returncode == 1
        assert "libstb-dev" in done.stderr
        return
    assert done.returncode == 0, done.stderr
    assert levels(artifact, tmp_path / "input.f32", tmp_path / name).max() <= 1


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("change", [damage, Path.unlink, lambda path: os.truncate(path, 100)])
@pytest.mark.parametrize(
    "name", ["model.so", "libtvm_runtime.so", "weights.safetensors", "metadata.json"]
)
def test_damaged_file(call, artifact, tmp_path, name, change):
    image = photo(tmp_path, (8, 8))
    change(artifact / name)
    done = call(artifact, image)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("run_artifact: error: ")
    assert name in done.stderr


def test_damaged_weights_without_their_digest(call, artifact, tmp_path):
    image = photo(tmp_path, (8, 8))
    path = artifact / "weights.safetensors"
    content = path.read_bytes()
    for header in (b"{", b"[1]", content[8:].replace(b"[3,8,8]", b"[3,8,9]")[:100]):
        path.write_bytes(len(header).to_bytes(8, "little") + header)
        done = call(artifact, image, "--trust-weights")
        assert done.returncode == 1
        assert "weights.safetensors" in done.stderr


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"features": ("i8mm", "xop")}, "lacks"),
        ({"triple": "riscv64-unknown-linux-gnu"}, "is for riscv64"),
        ({"triple": f"{machine.architecture()}-pc-windows-msvc"}, "windows"),
        ({"kind": "cuda"}, "GPU"),
    ],
)
def test_other_machine(call, artifact, tmp_path, changes, message):
    described = read_metadata(artifact)
    target = dataclasses.replace(described.target, **changes)
    described = dataclasses.replace(described, target=target)
    (artifact / "metadata.json").write_text(described.dumps())
    done = call(artifact, photo(tmp_path, (8, 8)))
    assert done.returncode == 1
    assert message in done.stderr


def test_runtime_library_of_the_system(call, toy, tmp_path, monkeypatch):
    toy.write(tmp_path / "artifact", runtime={})
    image = photo(tmp_path, (8, 8))
    done = call(tmp_path / "artifact", image)
    assert done.returncode == 1
    assert "libtvm_runtime.so" in done.stderr
    found = library.installed_runtime()
    assert found is not None
    monkeypatch.setenv("LD_LIBRARY_PATH", str(found[0].parent))
    done = call(tmp_path / "artifact", image)
    assert done.returncode == 0, done.stderr


def test_other_version(call, artifact, tmp_path):
    path = artifact / "metadata.json"
    version = metadata.SCHEMA_VERSION
    path.write_text(
        path.read_text().replace(f'"schema_version": {version}', '"schema_version": 99')
    )
    done = call(artifact, photo(tmp_path, (8, 8)))
    assert done.returncode == 1
    assert f"version 99, and this program reads {version}" in done.stderr


def test_unusable_arguments(call, artifact, tmp_path):
    (tmp_path / "short.f32").write_bytes(b"1234")
    (tmp_path / "short.ppm").write_bytes(b"P6 100 100 255\n123")
    (tmp_path / "text.txt").write_text("text")
    for arguments in (
        [artifact],
        [artifact, "none.ppm"],
        [artifact, "short.f32"],
        [artifact, "short.ppm"],
        [artifact, "text.txt"],
        [artifact, tmp_path],
        [artifact, photo(tmp_path, (8, 8)), "--top", "x"],
        ["none", "short.f32"],
    ):
        done = call(*arguments)
        assert done.returncode == 1, arguments
        assert done.stderr.startswith("run_artifact: error: ")


HASH = """
#include <cstdio>
#include <fstream>
#include <iterator>
#include <vector>

#include "digests.hpp"

int main(int argc, char** argv) {
  for (int i = 1; i < argc; ++i) {
    std::ifstream file(argv[i], std::ios::binary);
    std::vector<char> content(std::istreambuf_iterator<char>(file), {});
    std::puts(Digest(content.data(), content.size()).c_str());
  }
}
"""


@pytest.mark.parametrize("option", ["-DPORTABLE_SHA256", "-DDEFAULT"])
def test_digests(tmp_path, rng, option):
    """Without the processor's instructions, and with them where it has them."""
    (tmp_path / "main.cpp").write_text(HASH)
    command = ["g++", "-std=c++17", "-O1", "-pthread", option, f"-I{SOURCES}", "main.cpp"]
    subprocess.run([*command, SOURCES / "digests.cpp", "-o", "main"], cwd=tmp_path, check=True)
    files = []
    for size in (0, 1, 55, 56, 63, 64, 65, 119, 120, 1000, PART - 1, PART, PART + 1):
        files.append(tmp_path / str(size))
        files[-1].write_bytes(rng.bytes(size))
    done = subprocess.run([tmp_path / "main", *files], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [digest_of_file(path) for path in files]


def test_features_of_processors_are_those_of_python():
    source = (SOURCES / "machine.cpp").read_text()
    assert dict(re.findall(r'\{"([\w.-]+)", "(\w+)"\}', source)) == machine._KERNEL_FLAGS
