"""TVM's runtime library for another system."""

import subprocess
import zipfile
from pathlib import Path

import pytest

from dcnv3_tvm import runtime
from dcnv3_tvm.compiler import runtime_wheel
from dcnv3_tvm.compiler.runtime_wheel import runtime_libraries
from dcnv3_tvm.environment import DCNV3_TVM_CACHE
from dcnv3_tvm.errors import DCNv3Warning, InvalidArgumentError, MissingDependencyError
from dcnv3_tvm.runtime import library
from dcnv3_tvm.systems import SYSTEMS, this_system
from helpers.toy import Toy

SYSTEM = SYSTEMS["windows-x86_64"]
VERSION = library.installed_runtime()[1]


def make_wheel(path, *, version=VERSION, tag="win_amd64", name="tvm_runtime.dll"):
    about = f"apache_tvm-{version}.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{about}/METADATA", f"Metadata-Version: 2.4\nVersion: {version}\n")
        archive.writestr(f"{about}/WHEEL", f"Wheel-Version: 1.0\nTag: py3-none-{tag}\n")
        archive.writestr(f"tvm/lib/{name}", b"library")
    return path


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv(DCNV3_TVM_CACHE.name, str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def downloads(monkeypatch):
    """The commands that were run, which answer like pip."""
    commands = []

    def run(command, **_):
        commands.append(command)
        make_wheel(Path(command[command.index("--dest") + 1]) / "apache_tvm.whl")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(runtime_wheel.subprocess, "run", run)
    return commands


def test_of_this_system():
    found = runtime_libraries(this_system(), on_gpu=True)
    assert set(found) == {"libtvm_runtime.so", "libtvm_runtime_cuda.so"}
    assert found["libtvm_runtime.so"] == library.installed_runtime()[0].read_bytes()


def test_given_wheel(tmp_path):
    wheel = make_wheel(tmp_path / "any name")
    found = runtime_libraries(SYSTEM, on_gpu=False, wheel=wheel)
    assert found == {"tvm_runtime.dll": b"library"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": "0.1"}, rf"got .*: 0\.1 for win_amd64; allowed: apache-tvm=={VERSION} for"),
        ({"tag": "manylinux_2_28_aarch64"}, "another system.*pip download .*--platform win_amd64"),
        ({"name": "libtvm_runtime.so"}, "cannot be read; got .*tvm_runtime.dll"),
    ],
)
def test_wrong_wheel(tmp_path, changes, message):
    wheel = make_wheel(tmp_path / "x.whl", **changes)
    with pytest.raises(InvalidArgumentError, match=message):
        runtime_libraries(SYSTEM, on_gpu=False, wheel=wheel)


def test_not_a_wheel(tmp_path):
    (tmp_path / "x.whl").write_text("no")
    for name in ("x.whl", "missing.whl"):
        with pytest.raises(InvalidArgumentError, match=f"cannot be read; got .*{name}"):
            runtime_libraries(SYSTEM, on_gpu=False, wheel=tmp_path / name)


@pytest.mark.parametrize("tag", ["manylinux_2_27_aarch64", "manylinux_2_28_aarch64"])
def test_any_glibc_that_the_wheel_supports(tmp_path, tag):
    wheel = make_wheel(tmp_path / "x.whl", tag=tag, name="libtvm_runtime.so")
    assert runtime_libraries(SYSTEMS["linux-aarch64"], on_gpu=False, wheel=wheel)


def test_download_once(downloads, cache):
    for _ in range(2):
        assert runtime_libraries(SYSTEM, on_gpu=False) == {"tvm_runtime.dll": b"library"}
    (command,) = downloads
    assert command[command.index("--platform") + 1] == "win_amd64"
    assert command[-1] == f"apache-tvm=={VERSION}"
    assert [path.name for path in cache.rglob("*") if path.is_file()] == ["tvm_runtime.dll"]


def test_without_a_cache(downloads, monkeypatch):
    monkeypatch.setenv(DCNV3_TVM_CACHE.name, "off")
    for _ in range(2):
        assert runtime_libraries(SYSTEM, on_gpu=False)
    assert len(downloads) == 2


def test_without_a_network(monkeypatch):
    def run(command, **_):
        return subprocess.CompletedProcess(command, 1, "", "WARNING: x\nERROR: no network\n")

    monkeypatch.setattr(runtime_wheel.subprocess, "run", run)
    with pytest.warns(DCNv3Warning, match=r"no tvm_runtime.dll.*\(ERROR: no network\)"):
        assert runtime_libraries(SYSTEM, on_gpu=False) == {}


def test_artifact_without_a_runtime_library(tmp_path, monkeypatch):
    from dcnv3_tvm.compiler import artifact

    toy = Toy.build()
    folder = tmp_path / "artifact"
    artifact.write(folder, library=toy.code, weights=toy.weights, metadata=toy.metadata, runtime={})
    metadata = runtime.read_metadata(folder)
    assert metadata.libraries == ()
    assert f"apache-tvm=={VERSION}" in (folder / "README.md").read_text()
    runtime.load(folder).save(tmp_path / "copy")  # The installed library is loaded.
    monkeypatch.setattr(library, "_loaded_version", None)
    monkeypatch.setattr(library, "_version_of_imported_tvm", lambda: None)
    monkeypatch.setattr(library, "installed_runtime", lambda: None)
    with pytest.raises(MissingDependencyError, match=f"without libtvm.*apache-tvm=={VERSION}"):
        runtime.load(folder)
