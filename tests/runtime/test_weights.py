"""The weights file: layout, memory-mapping, and errors about damaged files."""

import dataclasses
import gc
import json
import mmap
import shutil
import tracemalloc
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy
import tvm  # noqa: F401  # Loads TVM's runtime library.

from dcnv3_tvm import runtime
from dcnv3_tvm.digests import digest_of_file
from dcnv3_tvm.errors import ArtifactError
from dcnv3_tvm.runtime import weights
from dcnv3_tvm.runtime.tensors import ALIGNMENT, to_numpy

NAME = "weights.safetensors"


def some_weights() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(5)
    return {
        "odd": rng.standard_normal(27).astype(np.float32),
        "a": rng.standard_normal((3, 16)).astype(np.float32),
        "bfloat16": rng.standard_normal((4, 8)).astype(ml_dtypes.bfloat16),
        "odd, the largest": rng.standard_normal(1001).astype(np.float32),
        "int32": rng.integers(-(2**31), 2**31, (2, 8), np.int32),
        "odd bfloat16": rng.standard_normal((3, 3)).astype(ml_dtypes.bfloat16),
        "odd int32": rng.integers(-(2**31), 2**31, 3, np.int32),
        "strided": rng.standard_normal((16, 6)).T[::2],
        "empty": np.zeros((0, 4), np.float32),
        "scalar": np.array(2.5, np.float16),
        "bool": rng.random(65) > 0.5,
    }


MAPPED = {"a", "bfloat16", "odd, the largest", "int32", "strided"}


def mappings(path: Path) -> list[range]:
    """Return the addresses at which a file is mapped into this process."""
    found = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        if line.removesuffix(" (deleted)").endswith(f" {path}"):
            start, end = line.split()[0].split("-")
            found.append(range(int(start, 16), int(end, 16)))
    return found


def is_mapped(tensor, path: Path) -> bool:
    address = to_numpy(tensor).ctypes.data
    return any(address in addresses for addresses in mappings(path))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    weights.write(tmp_path / NAME, some_weights())
    return tmp_path / NAME


def assert_as_written(tensors) -> None:
    given = some_weights()
    assert set(tensors) == set(given)
    for name, tensor in tensors.items():
        array = to_numpy(tensor)
        assert array.dtype == given[name].dtype
        np.testing.assert_array_equal(array, given[name])
        assert array.ctypes.data % ALIGNMENT == 0 or array.size == 0


def test_aligned_tensors_are_mapped_and_others_copied(path):
    tensors, _ = weights.read(path)
    assert_as_written(tensors)
    assert {name for name in tensors if is_mapped(tensors[name], path)} - {"empty"} == MAPPED


def test_read_if_mapping_fails(path, monkeypatch):
    expected = weights.read(path)[1]

    def fail(*_, **__):
        raise OSError(19, "No such device")

    monkeypatch.setattr(mmap, "mmap", fail)
    tensors, digest = weights.read(path)
    assert not mappings(path)
    assert digest == expected
    assert_as_written(tensors)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ArtifactError, match="truncated"):
        weights.read(path)
    assert_as_written(tensors)


def test_safetensors_reads_our_files(path):
    given = some_weights()
    with safetensors.safe_open(path, "numpy") as file:
        assert set(file.keys()) == set(given)
    data = dict(safetensors.deserialize(path.read_bytes()))
    tags = {"bfloat16": "BF16", "int32": "I32", "bool": "BOOL", "scalar": "F16", "strided": "F64"}
    for name, array in given.items():
        assert tuple(data[name]["shape"]) == array.shape
        assert bytes(data[name]["data"]) == np.ascontiguousarray(array).tobytes()
        assert data[name]["dtype"] == tags.get(name, data[name]["dtype"])


def test_files_of_safetensors_are_read(tmp_path):
    given = {name: array for name, array in some_weights().items() if "bfloat16" not in name}
    given = {name: np.ascontiguousarray(array) for name, array in given.items()}
    safetensors.numpy.save_file(given, tmp_path / NAME, metadata={"format": "np"})
    tensors, _ = weights.read(tmp_path / NAME)
    for name, array in given.items():
        np.testing.assert_array_equal(to_numpy(tensors[name]), array)


@pytest.mark.parametrize("length", range(1, 70, 4))
def test_data_is_aligned_for_any_header_length(tmp_path, length):
    weights.write(tmp_path / NAME, {"n" * length: np.ones(16, np.float32)})
    tensors, _ = weights.read(tmp_path / NAME)
    assert is_mapped(tensors["n" * length], tmp_path / NAME)


def test_no_weights(tmp_path):
    weights.write(tmp_path / NAME, {})
    assert weights.read(tmp_path / NAME)[0] == {}
    assert safetensors.numpy.load_file(tmp_path / NAME) == {}


@pytest.mark.parametrize("dtype", [">f4", "complex64", "U3"])
def test_unsupported_dtype(toy, tmp_path, dtype):
    bad = dataclasses.replace(toy, weights=toy.weights | {"x": np.zeros(3, dtype)})
    with pytest.raises(ArtifactError, match=r"'x'.*allowed: float64, .*bfloat16"):
        bad.write(tmp_path / "x")
    assert not list(tmp_path.iterdir())


def test_writing_copies_one_weight_at_a_time(tmp_path):
    given = {f"{index}": np.ones((512, 512), np.float32)[:, ::-1] for index in range(16)}
    tracemalloc.start()
    try:
        weights.write(tmp_path / NAME, given)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 3 * 512 * 512 * 4


def test_reading_copies_nothing(tmp_path):
    weights.write(tmp_path / NAME, {f"{index}": np.ones(1 << 16) for index in range(16)})
    tracemalloc.start()
    try:
        tensors, _ = weights.read(tmp_path / NAME)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(tensors) == 16
    assert peak < 1 << 18


def test_tensor_keeps_the_mapping_alive(path):
    tensors, _ = weights.read(path)
    kept = tensors["strided"]
    copied = tensors["odd"]
    del tensors
    gc.collect()
    assert len(mappings(path)) == 1
    path.unlink()
    np.testing.assert_array_equal(to_numpy(kept), some_weights()["strided"])
    del kept
    gc.collect()
    assert not mappings(path)
    np.testing.assert_array_equal(to_numpy(copied), some_weights()["odd"])


def test_writes_to_a_tensor_do_not_change_the_file(path):
    before = path.read_bytes()
    array = to_numpy(weights.read(path)[0]["a"])
    array += 1
    np.testing.assert_array_equal(array, some_weights()["a"] + 1)
    assert path.read_bytes() == before


def test_digest_is_optional(path):
    assert weights.read(path)[1] == digest_of_file(path)
    assert weights.read(path, digest=False)[1] == ""


def test_modified_byte_of_a_mapped_tensor(artifact_path):
    path = artifact_path / NAME
    header = json.loads(path.read_bytes()[8:].partition(b"}}")[0] + b"}}")
    assert header["bias"]["data_offsets"] == [0, 768]
    with path.open("r+b") as stream:
        stream.seek(-400, 2)
        stream.write(b"\x7f")
    with pytest.raises(ArtifactError, match=r"weights\.safetensors was modified"):
        runtime.load(artifact_path)
    gc.collect()
    assert not mappings(path)
    runtime.load(artifact_path, verify_digests=False)


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("change", ["replaced", "removed"])
def test_model_outlives_its_folder(toy, artifact_path, image, change, verify):
    model = runtime.load(artifact_path, verify_digests=verify)
    assert len(mappings(artifact_path / NAME)) == 1
    if change == "replaced":
        dataclasses.replace(toy, weights={"bias": toy.weights["bias"] + 1}).write(artifact_path)
    else:
        shutil.rmtree(artifact_path)
    np.testing.assert_array_equal(model(image), toy.main(image))
    np.testing.assert_array_equal(model.features(image)[0], image + toy.weights["bias"])


def test_close_unmaps_the_file(toy, artifact_path, image):
    model = runtime.load(artifact_path)
    result, maps = model(image), model.features(image)
    assert len(mappings(artifact_path / NAME)) == 1
    model.close()
    assert not mappings(artifact_path / NAME)
    np.testing.assert_array_equal(result, toy.main(image))
    np.testing.assert_array_equal(maps[1], np.maximum(image, 0))
