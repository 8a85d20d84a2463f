"""Artifact folders: atomic writing, reading back, and errors about damaged ones."""

import dataclasses
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from dcnv3_tvm import files, machine, runtime
from dcnv3_tvm.compiler import artifact
from dcnv3_tvm.errors import ArtifactError, InvalidArgumentError, TargetError
from dcnv3_tvm.runtime import ArtifactMetadata, TargetInfo, copied_library, library, loading
from dcnv3_tvm.runtime import weights as weights_file

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


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS])
@pytest.mark.parametrize("method", ["write", "save"])
@pytest.mark.parametrize("stage", ["copyfile", "fsync", "mkdir"])
def test_full_or_read_only_disk(toy, artifact_path, tmp_path, monkeypatch, method, stage, code):
    destination = toy.write(tmp_path / "precious")
    before = contents(destination)
    act = toy.write if method == "write" else runtime.load(artifact_path).save
    remaining = [0 if (method, stage) == ("write", "copyfile") else 1]

    def fail(*arguments, **keywords):
        if remaining[0]:
            remaining[0] -= 1
            return original(*arguments, **keywords)
        raise OSError(code, os.strerror(code), str(arguments[0]))

    owner, name = {
        "copyfile": (shutil, "copyfile"),
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


@pytest.mark.parametrize("stage", ["copyfile", "fsync"])
def test_interrupted_write_changes_nothing(toy, artifact_path, tmp_path, monkeypatch, stage):
    before = contents(artifact_path)

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil if stage == "copyfile" else os, stage, interrupt)
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


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("name", ["model.so", "weights.safetensors", "libtvm_runtime.so"])
@pytest.mark.parametrize("position", [0, 100, -1])
def test_modified_byte(artifact_path, name, position):
    flip(artifact_path / name, position)
    with pytest.raises(ArtifactError, match=name.replace(".", r"\.")):
        runtime.load(artifact_path)


def test_modified_metadata(artifact_path):
    path = artifact_path / "metadata.json"
    path.write_text(path.read_text().replace('"dtype": "float32"', '"dtype": "float16"'))
    with pytest.raises(ArtifactError, match=r"metadata\.json was modified"):
        runtime.load(artifact_path)


@pytest.mark.parametrize("name", sorted(FILES - {"README.md"}))
def test_missing_file(artifact_path, name):
    (artifact_path / name).unlink()
    with pytest.raises(ArtifactError, match=name.replace(".", r"\.")):
        runtime.load(artifact_path)


def test_not_an_artifact(tmp_path):
    with pytest.raises(ArtifactError, match=r"artifact does not exist.*dcnv3-tvm compile"):
        runtime.load(tmp_path / "nothing")
    with pytest.raises(ArtifactError, match="not an artifact"):
        runtime.load(tmp_path)
    (tmp_path / "file").write_text("x")
    with pytest.raises(ArtifactError, match="an artifact is a folder"):
        runtime.load(tmp_path / "file")
    with pytest.raises(ArtifactError, match=r"cannot be read.*File name too long"):
        runtime.load("x" * 1000)


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"path": None}, "path is not a path; got None"),
        ({"path": b"x"}, "path is not a path"),
        ({"path": ""}, "not a valid path"),
        ({"threads": 2.5}, "threads is out of range; got 2.5"),
        ({"threads": True}, "threads is out of range; got True"),
        ({"threads": 0}, "threads is out of range; got 0"),
        ({"threads": 10**6}, "at least 1 and at most 1024"),
        ({"verify_digests": "no"}, "verify_digests is not a boolean"),
        ({"device": 0}, "the device name is invalid; got 0"),
        ({"device": "cuda:" + "9" * 5000}, "the device name is invalid"),
    ],
)
def test_invalid_arguments(artifact_path, keywords, message):
    with pytest.raises((InvalidArgumentError, TargetError), match=message):
        runtime.load(**{"path": artifact_path} | keywords)


def test_unreadable_file(artifact_path, monkeypatch):
    def deny(self, *_, **__):
        raise PermissionError(errno.EACCES, "Permission denied", str(self))

    monkeypatch.setattr(Path, "read_bytes", deny)
    with pytest.raises(ArtifactError, match=r"model\.so cannot be read.*Permission denied"):
        runtime.load(artifact_path)
    monkeypatch.setattr(Path, "read_text", deny)
    with pytest.raises(ArtifactError, match=r"metadata\.json cannot be read"):
        runtime.load(artifact_path)


def edit(artifact_path: Path, **changes: object) -> None:
    path = artifact_path / "metadata.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("version", [0, 2, None, "3"])
def test_unsupported_schema_version(artifact_path, version):
    edit(artifact_path, schema_version=version)
    with pytest.raises(ArtifactError, match="another schema version"):
        runtime.load(artifact_path)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '"x"', '{"schema_version": 3}'])
def test_invalid_metadata(artifact_path, text):
    (artifact_path / "metadata.json").write_text(text)
    for verify in (True, False):
        with pytest.raises(ArtifactError, match=r"metadata\.json"):
            runtime.load(artifact_path, verify_digests=verify)


def test_metadata_is_not_text(artifact_path):
    (artifact_path / "metadata.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ArtifactError, match="not valid JSON"):
        runtime.load(artifact_path)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (TargetInfo("rocm"), "neither for a CPU nor for an NVIDIA GPU"),
        (TargetInfo("llvm", "riscv64-unknown-linux-gnu"), "another CPU architecture"),
        (TargetInfo("llvm", features=("+avx512f", "amx-int8", "clwb")), "lacks amx-int8"),
    ],
)
def test_target_does_not_fit(toy, tmp_path, monkeypatch, target, message):
    monkeypatch.setattr(machine, "cpu_features", lambda: frozenset({"avx2", "avx512f"}))
    with pytest.raises(TargetError, match=message):
        runtime.load(toy.write(tmp_path / "x", target=target))


def test_amx_is_permitted_by_the_system(toy, tmp_path, monkeypatch):
    """Only artifacts whose kernels use AMX ask for the permission."""
    monkeypatch.setattr(machine, "cpu_features", lambda: machine.AMX_FEATURES)
    monkeypatch.setattr(loading, "enable_amx", lambda: False)
    target = TargetInfo("llvm", machine.architecture(), features=("amx-bf16", "amx-tile"))
    assert runtime.load(toy.write(tmp_path / "x", target=target)).metadata.uses_amx is False
    kernels = {"matmul": "tile_matmul"}
    with pytest.raises(TargetError, match=r'denies the use of AMX.*dtype="float32"'):
        runtime.load(toy.write(tmp_path / "x", target=target, kernels=kernels))
    monkeypatch.setattr(machine, "cpu_features", frozenset)
    with pytest.raises(TargetError, match=r"lacks amx-bf16, amx-tile\. Compile the model again"):
        runtime.load(toy.write(tmp_path / "x", target=target, kernels=kernels))


def test_features_of_this_machine_are_accepted(toy, tmp_path, image):
    target = TargetInfo("llvm", machine.architecture(), features=tuple(machine.cpu_features()))
    model = runtime.load(toy.write(tmp_path / "x", target=target))
    np.testing.assert_array_equal(model(image), toy.main(image))


def test_unsupported_tvm_version(toy, tmp_path):
    path = toy.write(tmp_path / "x", versions=artifact.installed_versions() | {"tvm": "0.28.0"})
    with pytest.raises(ArtifactError, match=r"allowed: TVM 0\.28\.0.*pip install"):
        runtime.load(path)


def test_device_does_not_fit(artifact_path):
    with pytest.raises(TargetError, match=r"runs on cpu, not on cuda.*--target cuda"):
        runtime.load(artifact_path, device="cuda")
    with pytest.raises(TargetError, match="allowed: 'cpu', 'cuda', 'cuda:1'"):
        runtime.load(artifact_path, device="tpu")
    assert runtime.load(artifact_path, device="cpu").device == "cpu"


@pytest.mark.parametrize("keep", [0, 4, 8, 40, 200, -1])
def test_truncated_weights(artifact_path, keep):
    path = artifact_path / "weights.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    for verify in (True, False):
        with pytest.raises(ArtifactError, match=r"weights\.safetensors"):
            runtime.load(artifact_path, verify_digests=verify)


@pytest.mark.parametrize(
    "header",
    [
        b"not json",
        b"[]",
        b'{"a": 1}',
        b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "X8", "shape": [2], "data_offsets": [0, 8]}}',
        b'{"a": {"dtype": "F32", "shape": [-2], "data_offsets": [8, 0]}}',
        b'{"a": {"dtype": "F32", "shape": [9999999999], "data_offsets": [0, 39999999996]}}',
        b'{"a": {"dtype": "F32", "shape": [-2, -1], "data_offsets": [0, 8]}}',
        b'{"a": {"dtype": "F32", "shape": [2.0], "data_offsets": [0, 8]}}',
        b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0.0, 8.0]}}',
        b'{"a": {"dtype": "F32", "shape": [2, true], "data_offsets": [0, 8]}}',
        b'{"a": {"dtype": "F32", "shape": [0, 1e99], "data_offsets": [0, 0]}}',
        b'{"a": {"dtype": "F32", "shape": [0, 99999999999999999999], "data_offsets": [0, 0]}}',
        b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}, '
        b'"b": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}',
        b"[" * 100_000,
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}',
    ],
)
def test_broken_weights(tmp_path, header):
    path = tmp_path / "w.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with pytest.raises(ArtifactError, match="not a safetensors file"):
        weights_file.read(path)


def test_every_weight_type_round_trips(toy, tmp_path):
    rng = np.random.default_rng(3)
    values = rng.standard_normal((3, 5)) * 10
    given = {
        name: values.astype(name)
        for name in ("float64", "float32", "float16", "int64", "int32", "int8", "uint8", "bool")
    }
    given["bfloat16"] = values.astype(ml_dtypes.bfloat16)
    given["strided"] = values[:, ::2].astype(np.float32).T
    given["scalar"] = np.array(2.5)
    given["empty"] = np.zeros((0, 4), np.float32)
    path = toy.write(tmp_path / "x").joinpath("weights.safetensors")
    main = toy.metadata.entries["main"]
    artifact.write(
        tmp_path / "x",
        library=toy.code,
        weights=given,
        metadata=dataclasses.replace(
            toy.metadata, entries={"main": dataclasses.replace(main, weights=())}
        ),
    )
    read, digest = weights_file.read(path)
    assert digest == runtime.read_metadata(tmp_path / "x").digests["weights.safetensors"]
    assert set(read) == set(given)
    for name, tensor in read.items():
        from dcnv3_tvm.runtime.tensors import to_numpy

        array = to_numpy(tensor)
        assert array.dtype == given[name].dtype
        np.testing.assert_array_equal(array, given[name])
        assert array.ctypes.data % 64 == 0 or array.size == 0


def test_missing_weight(toy, tmp_path):
    with pytest.raises(ArtifactError, match="bias"):
        dataclasses.replace(toy, weights={}).write(tmp_path / "x")
    assert not list(tmp_path.iterdir())


def test_invalid_library(toy, tmp_path):
    path = dataclasses.replace(toy, code=b"\x7fELF invalid").write(tmp_path / "x")
    with pytest.raises(ArtifactError, match=r"model\.so cannot be loaded"):
        runtime.load(path)


def test_load_without_a_temporary_folder(artifact_path, toy, image, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", "/nonexistent")
    models = [runtime.load(artifact_path) for _ in range(3)]
    for model in models:
        np.testing.assert_array_equal(model(image), toy.main(image))
    monkeypatch.delattr(os, "memfd_create")
    with pytest.raises(ArtifactError, match=r"neither from memory.*'/nonexistent.*Set TMPDIR"):
        runtime.load(artifact_path)
    monkeypatch.undo()


def test_load_with_a_temporary_folder_only(artifact_path, toy, image, monkeypatch):
    monkeypatch.delattr(os, "memfd_create")
    np.testing.assert_array_equal(runtime.load(artifact_path)(image), toy.main(image))


def test_temporary_folder_that_may_not_hold_code():
    def deny(path):
        raise OSError(f"{path}: failed to map segment from shared object")

    with pytest.raises(ArtifactError, match=r"failed to map segment.*Set TMPDIR.*noexec"):
        copied_library.load(b"code", deny)


def test_tvm_library_path(tmp_path, monkeypatch):
    (tmp_path / "libtvm_runtime.so").write_bytes(b"")
    monkeypatch.setenv("TVM_LIBRARY_PATH", str(tmp_path))
    found = library.installed_runtime()
    assert found is not None
    assert found[0].parent == tmp_path
