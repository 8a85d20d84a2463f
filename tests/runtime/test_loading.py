"""Loading: artifacts that are damaged, unsupported or for another machine, and where it works."""

import dataclasses
import errno
import json
import os
import tempfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from dcnv3_tvm import machine, runtime
from dcnv3_tvm.compiler import artifact
from dcnv3_tvm.errors import ArtifactError, InvalidArgumentError, TargetError
from dcnv3_tvm.runtime import TargetInfo, copied_library, library, loading
from dcnv3_tvm.runtime import weights as weights_file
from dcnv3_tvm.systems import this_system
from helpers.toy import flip


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


@pytest.mark.parametrize(
    "name", ["libtvm_runtime.so", "metadata.json", "model.so", "weights.safetensors"]
)
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
        (TargetInfo("llvm", "riscv64-unknown-linux-gnu"), "another system"),
        (TargetInfo("llvm", features=("+avx512f", "amx-int8", "clwb")), "lacks amx-int8"),
    ],
)
def test_target_does_not_fit(toy, tmp_path, target, message, report_features):
    report_features({"avx2", "avx512f"})
    with pytest.raises(TargetError, match=message):
        runtime.load(toy.write(tmp_path / "x", target=target))


def test_amx_is_permitted_by_the_system(toy, tmp_path, monkeypatch, report_features):
    """Only artifacts whose kernels use AMX ask for the permission."""
    report_features(machine.AMX_FEATURES)
    monkeypatch.setattr(loading, "enable_amx", lambda: False)
    target = TargetInfo("llvm", this_system().triple, features=("amx-bf16", "amx-tile"))
    assert runtime.load(toy.write(tmp_path / "x", target=target)).metadata.uses_amx is False
    kernels = {"matmul": "tile_matmul"}
    with pytest.raises(TargetError, match=r'denies the use of AMX.*dtype="float32"'):
        runtime.load(toy.write(tmp_path / "x", target=target, kernels=kernels))
    report_features(set())
    with pytest.raises(TargetError, match=r"lacks amx-bf16, amx-tile\. Compile the model again"):
        runtime.load(toy.write(tmp_path / "x", target=target, kernels=kernels))


def test_features_of_this_machine_are_accepted(toy, tmp_path, image):
    target = TargetInfo("llvm", this_system().triple, features=tuple(machine.cpu_features()))
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
