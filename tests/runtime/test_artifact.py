"""Artifact folders: what is written, and that it is written whole or not at all."""

import dataclasses
import errno
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import numpy as np
import pytest

from dcnv3_tvm import files, runtime
from dcnv3_tvm.compiler import artifact
from dcnv3_tvm.errors import ArtifactError, InvalidArgumentError
from dcnv3_tvm.runtime import ArtifactMetadata
from dcnv3_tvm.runtime import weights as weights_file
from helpers.toy import flip

FILES = {"model.so", "weights.safetensors", "metadata.json", "README.md", "libtvm_runtime.so"}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_files(artifact_path):
    assert {path.name for path in artifact_path.iterdir()} == FILES
    assert len({path.stat().st_mode for path in artifact_path.iterdir()}) == 1
    assert [path.name for path in artifact_path.parent.iterdir()] == ["artifact"]
    readme = (artifact_path / "README.md").read_text()
    assert "runtime.load" in readme
    assert "do not overwrite its files in place" in readme
    assert "| output | feature_1 | 1, 3, 8, 8 | NCHW | float32 | 8 |" in readme


def test_metadata_round_trip(toy, artifact_path):
    read = runtime.read_metadata(artifact_path)
    assert read.entries == toy.metadata.entries
    assert read.target == toy.metadata.target
    assert read.config == {"variant": "toy", "depths": [1, 2]}
    assert set(read.digests) == {"model.so", "weights.safetensors", "libtvm_runtime.so"}
    assert set(read.versions) == {"dcnv3_tvm", "tvm", "tvm_ffi"}
    assert read.created
    assert ArtifactMetadata.loads(read.dumps()) == read


def test_metadata_digest_with_integer_keys_and_floats(toy):
    config = {"by_level": {9: 0.1, 10: 1e-6}, "pair": (3, 3)}
    text = dataclasses.replace(toy.metadata, config=config).dumps()
    assert ArtifactMetadata.loads(text).config["by_level"] == {"9": 0.1, "10": 1e-6}


def test_write_replaces_an_artifact(toy, artifact_path, image):
    first = runtime.load(artifact_path)
    other = dataclasses.replace(toy, weights={"bias": toy.weights["bias"] + 1})
    other.write(artifact_path)
    second = runtime.load(artifact_path)
    np.testing.assert_array_equal(second(image), other.main(image))
    np.testing.assert_array_equal(first(image), toy.main(image))
    assert [path.name for path in artifact_path.parent.iterdir()] == ["artifact"]


def test_replaced_code_is_loaded(make_toy, toy, artifact_path, image):
    runtime.load(artifact_path)(image)
    make_toy("n").write(artifact_path)
    double = np.concatenate([image, image])
    np.testing.assert_array_equal(runtime.load(artifact_path)(double), toy.main(double))


def test_write_library_from_a_path(toy, tmp_path, image):
    library_path = tmp_path / "x.so"
    library_path.write_bytes(toy.code)
    artifact.write(
        str(tmp_path / "a" / "b"), library=library_path, weights=toy.weights, metadata=toy.metadata
    )
    np.testing.assert_array_equal(runtime.load(tmp_path / "a" / "b")(image), toy.main(image))


def test_save_after_the_source_was_removed(toy, artifact_path, tmp_path, image):
    model = runtime.load(artifact_path)
    model.save(tmp_path / "copy")
    assert contents(tmp_path / "copy") == contents(artifact_path)
    model.save(artifact_path)  # Onto itself.
    shutil.rmtree(artifact_path)
    np.testing.assert_array_equal(model(image), toy.main(image))
    with pytest.raises(ArtifactError, match="cannot be saved"):
        model.save(tmp_path / "third")
    assert not (tmp_path / "third").exists()
    np.testing.assert_array_equal(runtime.load(tmp_path / "copy")(image), toy.main(image))


def test_owner_lives_as_long_as_the_model(toy, tmp_path):
    owner = tempfile.TemporaryDirectory(dir=tmp_path)
    folder = Path(owner.name)
    model = runtime.load(toy.write(folder / "x"), owner=owner)
    del owner
    model.save(tmp_path / "kept")
    model.close()
    assert not folder.exists()
    assert (tmp_path / "kept").exists()


def test_save_of_a_modified_source(artifact_path, tmp_path):
    model = runtime.load(artifact_path)
    flip(artifact_path / "weights.safetensors", -1)
    with pytest.raises(ArtifactError, match=r"weights\.safetensors was changed"):
        model.save(tmp_path / "copy")
    assert not (tmp_path / "copy").exists()


@pytest.mark.parametrize("method", ["write", "save"])
def test_destination_that_is_not_an_artifact_is_kept(toy, artifact_path, tmp_path, method):
    home = tmp_path / "home"
    home.mkdir()
    (home / "thesis.txt").write_text("three years")
    occupied = tmp_path / "file"
    occupied.write_text("x")
    act = toy.write if method == "write" else runtime.load(artifact_path).save
    for destination in (home, occupied):
        with pytest.raises(ArtifactError, match="not an artifact"):
            act(destination)
    assert (home / "thesis.txt").read_text() == "three years"
    assert occupied.read_text() == "x"


@pytest.mark.parametrize("method", ["write", "save"])
def test_destination_that_holds_other_files_is_kept(toy, artifact_path, tmp_path, method):
    destination = toy.write(tmp_path / "destination")
    (destination / "results.jsonl").write_text("{}")
    act = toy.write if method == "write" else runtime.load(artifact_path).save
    with pytest.raises(ArtifactError, match=r"holds more than an artifact.*with results\.jsonl"):
        act(destination)
    (destination / "results.jsonl").rename(destination / ".DS_Store")  # As file managers write.
    act(destination)
    assert contents(destination).keys() == contents(artifact_path).keys()


def test_copy_inside_the_artifact(artifact_path, tmp_path):
    (tmp_path / "link").symlink_to(artifact_path)
    model = runtime.load(artifact_path)
    for folder in (artifact_path / "copy", tmp_path / "link" / "a" / "b"):
        with pytest.raises(InvalidArgumentError, match="which the same call reads"):
            model.save(folder)
    with pytest.raises(ArtifactError, match=r"symbolic link.*link to .*artifact"):
        model.save(tmp_path / "link")
    model.save(artifact_path / ".." / "copy")
    assert (tmp_path / "copy").exists()


@pytest.mark.parametrize("verify_digests", [True, False])
def test_artifact_that_is_replaced_while_it_is_loaded(
    toy, artifact_path, image, monkeypatch, verify_digests
):
    """The model is one of the two, not the code of one with the weights of the other."""
    other = dataclasses.replace(toy, weights={"bias": toy.weights["bias"] + 1})
    versions = [other, toy]
    read = weights_file.read

    def replace_and_read(*arguments, **keywords):
        if versions:
            versions.pop(0).write(artifact_path, name=f"version {len(versions)}")
        return read(*arguments, **keywords)

    monkeypatch.setattr(weights_file, "read", replace_and_read)
    model = runtime.load(artifact_path, verify_digests=verify_digests)
    assert model.metadata.name == "version 0"
    np.testing.assert_array_equal(model(image), toy.main(image))
    versions += 10 * [toy]
    with pytest.raises(ArtifactError, match="replaced again and again"):
        runtime.load(artifact_path, verify_digests=verify_digests)


def test_verification_of_a_replaced_artifact(toy, artifact_path, monkeypatch):
    verification = {"ok": True, "reference": "PyTorch", "outputs": [{"max_error": 0.0}]}
    verified = runtime.read_metadata(artifact_path)
    artifact.record_verification(artifact_path, verified, verification)
    assert runtime.read_metadata(artifact_path).verification == verification
    other = dataclasses.replace(toy, weights={"bias": toy.weights["bias"] + 1})
    other.write(artifact_path)
    with pytest.raises(ArtifactError, match="replaced while it was verified"):
        artifact.record_verification(artifact_path, verified, verification)
    assert runtime.read_metadata(artifact_path).verification is None

    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # No file name, as from write().

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(ArtifactError, match=rf"No space left on device \({artifact_path}\)"):
        artifact.record_verification(
            artifact_path, runtime.read_metadata(artifact_path), verification
        )


def test_folder_is_not_replaced_while_it_is_kept(toy, artifact_path, tmp_path):
    before = contents(artifact_path)
    (tmp_path / "link").symlink_to(artifact_path)
    with files.kept_folder(tmp_path / "link"):
        writer = threading.Thread(target=toy.write, args=[artifact_path], kwargs={"name": "new"})
        writer.start()
        writer.join(0.3)
        assert contents(artifact_path) == before
    writer.join()
    assert runtime.read_metadata(artifact_path).name == "new"


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS])
@pytest.mark.parametrize("method", ["write", "save"])
@pytest.mark.parametrize("stage", ["content", "fsync", "mkdir"])
def test_full_or_read_only_disk(toy, artifact_path, tmp_path, monkeypatch, method, stage, code):
    destination = toy.write(tmp_path / "precious")
    before = contents(destination)
    act = toy.write if method == "write" else runtime.load(artifact_path).save
    remaining = [1]

    def fail(*arguments, **keywords):
        if remaining[0]:
            remaining[0] -= 1
            return original(*arguments, **keywords)
        raise OSError(code, os.strerror(code), str(arguments[0]))

    owner, name = {
        "content": (Path, "write_bytes") if method == "write" else (shutil, "copyfile"),
        "fsync": (os, "fsync"),
        "mkdir": (Path, "mkdir"),
    }[stage]
    original = getattr(owner, name)
    monkeypatch.setattr(owner, name, fail)
    with pytest.raises(ArtifactError, match=os.strerror(code)) as caught:
        act(destination)
    monkeypatch.undo()
    assert "is unchanged" in str(caught.value)
    assert contents(destination) == before
    assert {path.name for path in tmp_path.iterdir()} == {"artifact", "precious"}


def test_error_while_writing_weights(toy, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # No file name, as from write().

    monkeypatch.setattr(weights_file, "write", fail)
    with pytest.raises(ArtifactError, match=r"No space left.*new"):
        toy.write(tmp_path / "new")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("owner", "stage"), [(Path, "write_bytes"), (os, "fsync")])
def test_interrupted_write_changes_nothing(toy, artifact_path, tmp_path, monkeypatch, owner, stage):
    before = contents(artifact_path)

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(owner, stage, interrupt)
    for destination in (artifact_path, tmp_path / "new"):
        with pytest.raises(KeyboardInterrupt):
            toy.write(destination)
    monkeypatch.undo()
    assert contents(artifact_path) == before
    assert [path.name for path in tmp_path.iterdir()] == ["artifact"]


def test_write_without_renameat2_exchange(toy, artifact_path, image, monkeypatch):
    monkeypatch.setattr(files, "_exchange", lambda *_: False)
    other = dataclasses.replace(toy, weights={"bias": toy.weights["bias"] + 1})
    other.write(artifact_path)
    np.testing.assert_array_equal(runtime.load(artifact_path)(image), other.main(image))
    assert [path.name for path in artifact_path.parent.iterdir()] == ["artifact"]

    before = contents(artifact_path)
    rename = Path.rename

    def second_rename_fails(self, target):
        if Path(target) == artifact_path and (self / "half").exists():
            raise OSError(errno.ENOSPC, "full")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", second_rename_fails)
    with pytest.raises(OSError, match="full"), files.atomic_folder(artifact_path) as folder:
        (folder / "half").write_text("x")
    assert contents(artifact_path) == before


def test_atomic_file(tmp_path):
    path = tmp_path / "maps.npz"
    path.write_text("old")

    def fail_half_way():
        with files.atomic_file(path) as temporary:
            temporary.write_text("new")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail_half_way()
    assert path.read_text() == "old"
    with files.atomic_file(path) as temporary:
        assert temporary.suffix == ".npz"
        temporary.write_text("new")
    assert path.read_text() == "new"
    assert [entry.name for entry in tmp_path.iterdir()] == ["maps.npz"]


def killed(code):
    """Run code that ends with SIGKILL, and return the names of the files it left."""
    source = f"import os, signal; from dcnv3_tvm import files\n{code}\n"
    kill = "os.kill(os.getpid(), signal.SIGKILL)"
    done = subprocess.run([sys.executable, "-c", source.replace("KILL", kill)], check=False)
    assert done.returncode == -signal.SIGKILL


def test_leftovers_of_killed_writers_are_removed(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    folder, file = tmp_path / "a", tmp_path / "a.npz"
    killed(
        "from pathlib import Path\n"
        f"with files.atomic_folder(Path({str(folder)!r})) as new:\n"
        "    (new / 'x').touch()\n"
        f"    with files.atomic_file(Path({str(file)!r})):\n"
        "        kept = files.temporary_folder('test-')\n"
        "        KILL"
    )
    left = {path.name for path in tmp_path.iterdir()}
    assert len(left) == 3
    with files.atomic_folder(folder), files.atomic_file(file):
        now = {path.name for path in tmp_path.iterdir()}
        assert len(now & left) == 1  # The temporary folder.
        # What living writers write is left alone.
        with files.atomic_folder(folder), files.atomic_file(file):
            assert now < {path.name for path in tmp_path.iterdir()}
        with files.temporary_folder("x-"), files.temporary_folder("x-"):
            assert not {path.name for path in tmp_path.iterdir()} & left
            assert len(list(tmp_path.glob("dcnv3-tvm-tmp-x-*"))) == 2
    assert {path.name for path in tmp_path.iterdir()} == {"a", "a.npz"}
