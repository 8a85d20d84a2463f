"""What differs on macOS and Windows, simulated: their calls, and the absence of Linux's."""

import ctypes
import io
import ntpath
import os
import platform
import signal
import tempfile
from pathlib import Path

import pytest

from dcnv3_tvm import files, machine, system_calls
from dcnv3_tvm.cli import process, run_batch
from dcnv3_tvm.errors import ArtifactError, DCNv3Error
from dcnv3_tvm.runtime import copied_library, library
from dcnv3_tvm.tvm_workarounds.process import set_max_concurrency


@pytest.fixture
def macos(monkeypatch):
    """A Mac whose values of ``sysctl`` are those of the returned dictionary."""
    values = {}

    class Libc:
        @staticmethod
        def sysctlbyname(name, value, size, new, new_size):
            assert (size._obj.value, new, new_size.value) == (8, None, 0)
            if name.decode() not in values:
                return -1
            value._obj.value = values[name.decode()]
            return 0

    monkeypatch.setattr(platform, "system", lambda: "Darwin")
    monkeypatch.setattr(system_calls.ctypes, "CDLL", lambda _: Libc)
    monkeypatch.delattr(os, "sched_getaffinity")
    return values


@pytest.fixture
def windows(monkeypatch):
    """A Windows machine with the features in the returned set, on two cores of two threads."""
    features = set()

    class Kernel:
        @staticmethod
        def IsProcessorFeaturePresent(number):  # noqa: N802 - Windows' own name
            return int(number in features)

        @staticmethod
        def GetLogicalProcessorInformation(records, length):  # noqa: N802
            relationships = [0, 3, 2, 0, 2]
            if records is None:
                length._obj.value = 32 * len(relationships)
                return 0
            assert ctypes.sizeof(records) == length._obj.value
            for record, relationship in zip(records, relationships, strict=True):
                record.relationship = relationship
            return 1

    monkeypatch.setattr(platform, "system", lambda: "Windows")
    monkeypatch.setattr(system_calls.ctypes, "WinDLL", lambda _: Kernel, raising=False)
    monkeypatch.delattr(os, "sched_getaffinity")
    return features


def test_features_on_macos(macos):
    assert machine.missing_features(["neon", "bf16"]) == []  # macOS 11 tells nothing.
    macos |= {"hw.optional.arm.FEAT_DotProd": 1, "hw.optional.arm.FEAT_BF16": 0}
    assert machine.cpu_features() == {"dotprod"}
    assert machine.missing_features(["neon", "bf16", "+dotprod", "i8mm"]) == ["bf16"]
    assert not machine.offers_amx.__wrapped__()


def test_fast_cores_on_macos(macos):
    assert machine.physical_cores() == os.cpu_count()
    macos["hw.physicalcpu"] = 8
    assert machine.physical_cores() == 8
    macos["hw.perflevel0.physicalcpu"] = 4
    assert machine.physical_cores() == 4


def test_features_on_windows(windows):
    assert machine.cpu_features() is None  # A Windows that does not know the numbers.
    assert machine.missing_features(["avx2"]) == []
    windows |= {13, 36, 37, 38, 39}
    assert machine.cpu_features() == {"sse3", "ssse3", "sse4.1", "sse4.2", "avx"}
    assert machine.missing_features(["avx", "avx2", "fma"]) == ["avx2"]


@pytest.mark.usefixtures("windows")
def test_cores_on_windows():
    assert machine.physical_cores() == 2


def test_thread_pools_on_windows(monkeypatch):
    calls = []

    def open_library(name):
        assert name == "tvm_runtime.dll"
        return type(
            "Library", (), {"?SetMaxConcurrency@threading@runtime@tvm@@YAXH@Z": calls.append}
        )

    monkeypatch.setattr(os, "name", "nt")
    monkeypatch.setattr(ctypes, "CDLL", open_library)
    set_max_concurrency(3)
    monkeypatch.undo()
    assert [call.value for call in calls] == [3]


def test_folders_without_locks_and_exchange(monkeypatch, tmp_path):
    monkeypatch.setattr(files, "fcntl", None)
    monkeypatch.setattr(files, "_exchange", lambda *_: False)
    monkeypatch.delattr(os, "getuid")
    for content in ("first", "second"):
        with files.atomic_folder(tmp_path / "x") as folder:
            (folder / "file").write_text(content)
        with files.atomic_file(tmp_path / "y") as file:
            file.write_text(content)
    assert (tmp_path / "x" / "file").read_text() == (tmp_path / "y").read_text() == "second"
    assert len(list(tmp_path.iterdir())) == 2


def test_library_that_stays_in_use(monkeypatch, tmp_path):
    """On Windows a loaded library cannot be removed before its process ends."""
    in_use = set()
    unlink = os.unlink

    def deny(path, *arguments, **keywords):
        if any(name in str(path) or name == str(path) for name in in_use):
            raise PermissionError(13, "in use", str(path))
        unlink(path, *arguments, **keywords)

    def load(path):
        in_use.add(Path(path).name)
        return Path(path).read_bytes()

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(files, "fcntl", None)
    monkeypatch.setattr(os, "unlink", deny)
    monkeypatch.delattr(os, "memfd_create")
    assert copied_library.load(b"first", load) == b"first"
    assert copied_library.load(b"second", load) == b"second"
    kept = [path.read_bytes() for path in tmp_path.rglob("model.so")]
    assert sorted(kept) == [b"first", b"second"]
    in_use.clear()  # That process ends, and another one loads a library, after a while.
    for folder in tmp_path.iterdir():
        os.utime(folder, (0, 0))
    # A third one is about to write its own.
    other = tmp_path / f"{files._TEMPORARY}{files.CODE}other"
    other.mkdir()
    assert copied_library.load(b"third", lambda path: Path(path).read_bytes()) == b"third"
    assert list(tmp_path.iterdir()) == [other]


def test_error_of_the_loader_on_windows(monkeypatch, tmp_path):
    """What is wrong with a library is not taken for a folder that may not hold code."""
    error = OSError(22, "The specified module could not be found")
    error.winerror = 126

    def load(_):
        raise error

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.delattr(os, "memfd_create")
    with pytest.raises(OSError, match="module could not be found"):
        copied_library.load(b"", load)
    monkeypatch.setattr(library.ctypes, "CDLL", lambda *_: load(None))
    with pytest.raises(ArtifactError, match=r"dll cannot be loaded.*module could not be found"):
        library.load_global(tmp_path / "tvm_runtime.dll")


def test_exchange_on_macos(monkeypatch, tmp_path):
    (tmp_path / "x").mkdir()

    class Libc:
        @staticmethod
        def renamex_np(first, second, flags):
            assert flags == 2
            third = second + b"old"
            for names in ((second, third), (first, second), (third, first)):
                os.rename(*names)
            return 0

    monkeypatch.setattr(files.ctypes, "CDLL", lambda *_, **__: Libc)
    with files.atomic_folder(tmp_path / "x") as folder:
        (folder / "file").write_text("new")
    assert [path.name for path in tmp_path.rglob("*")] == ["x", "file"]


def test_pipe_that_is_closed_on_windows(monkeypatch):
    stream = io.TextIOWrapper(io.FileIO(os.open(os.devnull, os.O_WRONLY), "w"), "cp1252")
    monkeypatch.setattr(stream, "flush", lambda: os.truncate(tempfile.gettempdir(), -1))
    with pytest.raises(DCNv3Error, match="Invalid argument"):
        process._write(stream, "x")
    monkeypatch.setattr(process.os, "name", "nt")
    with pytest.raises(process.StdoutClosedError):
        process._write(stream, "x")
    monkeypatch.undo()


def test_images_on_several_drives(monkeypatch):
    roots = [r"C:\photos", r"D:\photos"]
    monkeypatch.setattr(run_batch.os, "path", ntpath)
    found = [run_batch._relative(rf"{root}\a.jpg", roots) for root in roots]
    share = run_batch._relative(r"\\server\share\a.jpg", [roots[0], r"\\server\share"])
    same = run_batch._relative(r"C:\photos\a\b.jpg", [r"C:\photos\a", r"C:\photos"])
    monkeypatch.undo()
    assert found == [r"C\photos\a.jpg", r"D\photos\a.jpg"]
    assert (share, same) == (r"server\share\a.jpg", r"a\b.jpg")


def test_signals_without_sighup(monkeypatch):
    monkeypatch.delattr(signal, "SIGHUP")
    before = signal.getsignal(signal.SIGTERM)
    with process.prepared_process():
        assert signal.getsignal(signal.SIGTERM) is not before
    assert signal.getsignal(signal.SIGTERM) is before
