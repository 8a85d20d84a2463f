"""The stand-in for the published extension is found, installed, removed, and replaces nothing."""

import base64
import csv
import hashlib
import importlib
import importlib.metadata
import io
import sys
import types
from pathlib import Path

import pytest

from dcnv3_tvm.errors import DCNv3Error
from dcnv3_tvm.pytorch import extension_package, extensions, published_extension


@pytest.fixture
def environment(tmp_path, monkeypatch):
    """An empty folder of packages in ``sys.path``, into which the stand-in is installed."""
    folder = tmp_path / "site-packages"
    folder.mkdir()
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setattr(extensions, "environment_folder", lambda: folder)
    extensions.remove()
    yield folder
    extensions.remove()
    sys.modules.pop("DCNv3", None)


def check_module():
    module = importlib.import_module("DCNv3")
    assert module.dcnv3_forward is published_extension.dcnv3_forward
    assert module.dcnv3_backward is published_extension.dcnv3_backward
    assert float(importlib.metadata.version("DCNv3")) == 1.1


@pytest.mark.usefixtures("environment")
def test_in_this_process():
    path = list(sys.path)
    assert extensions.status() == extensions.ExtensionStatus("absent")
    found = extensions.install()
    assert (found.state, found.version) == ("stand-in", "1.1")
    assert extensions.install() == found
    check_module()
    assert extensions.status() == found
    assert extensions.remove().state == "absent"
    assert sys.path == path
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("DCNv3")
    with pytest.raises(importlib.metadata.PackageNotFoundError):
        importlib.metadata.version("DCNv3")
    assert not Path(found.location).exists()


class WorkingSet:
    """What pkg_resources knows, reduced to folders."""

    def __init__(self):
        self.entries, self.entry_keys, self.by_key = [], {}, {}

    def add_entry(self, folder):
        (path,) = Path(folder).glob("*.dist-info")
        name, version = path.stem.split("-")
        self.entries.append(folder)
        self.entry_keys[folder] = [name.lower()]
        self.by_key[name.lower()] = version


@pytest.mark.usefixtures("environment")
def test_pkg_resources_that_is_loaded_is_told(monkeypatch):
    working_set = WorkingSet()
    monkeypatch.setitem(
        sys.modules, "pkg_resources", types.SimpleNamespace(working_set=working_set)
    )
    extensions.install()
    assert working_set.by_key == {"dcnv3": "1.1"}
    extensions.remove()
    assert (working_set.entries, working_set.entry_keys, working_set.by_key) == ([], {}, {})


def test_in_an_environment(environment):
    for _ in range(2):
        found = extensions.install_in_environment()
    assert found == extensions.ExtensionStatus("stand-in", str(environment), "1.1")
    assert extensions.install() == found
    check_module()
    distribution = importlib.metadata.distribution("DCNv3")
    assert distribution.requires == ["dcnv3-tvm"]
    record = list(csv.reader(io.StringIO(distribution.read_text("RECORD"))))
    files = {path.relative_to(environment).as_posix() for path in environment.rglob("*.*")}
    files = {file for file in files if (environment / file).is_file() and ".pyc" not in file}
    assert {name for name, *_ in record} == files | {
        f"DCNv3-1.1.dist-info/{name}" for name in ("INSTALLER", "METADATA", "RECORD")
    }
    for name, digest, size in record[:-1]:
        content = (environment / name).read_bytes()
        found = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).decode().rstrip("=")
        assert (digest, int(size)) == (f"sha256={found}", len(content))
    # Removing what is in the process leaves the environment as it is.
    assert extensions.remove().state == "stand-in"
    sys.modules.pop("DCNv3")
    for _ in range(2):
        assert extensions.remove_from_environment().state == "absent"
    assert not list(environment.iterdir())


def test_what_a_killed_process_left_is_completed(environment):
    extensions.install_in_environment()
    (environment / "DCNv3" / "__init__.py").unlink()
    (environment / "DCNv3").rmdir()
    assert extensions.status().state == "absent"
    assert extensions.install_in_environment().state == "stand-in"
    check_module()


def write(folder, name, text=""):
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)


EXTENSIONS = {
    "module": {"DCNv3.py": ""},
    "package": {"DCNv3/__init__.py": ""},
    "distribution": {
        "DCNv3-1.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: DCNv3\nVersion: 1.0\n",
        "DCNv3-1.0.dist-info/INSTALLER": "pip\n",
    },
    "egg-info": {"DCNv3.egg-info/PKG-INFO": "Metadata-Version: 2.1\nName: DCNv3\nVersion: 1.0\n"},
}


@pytest.mark.parametrize("files", EXTENSIONS.values(), ids=EXTENSIONS)
def test_an_extension_is_not_replaced(environment, files):
    for name, text in files.items():
        write(environment, name, text)
    before = sorted(environment.rglob("*"))
    for install in (extensions.install, extensions.install_in_environment):
        with pytest.raises(DCNv3Error, match=r"is not replaced; got .*pip uninstall DCNv3"):
            install()
    found = extensions.remove_from_environment()
    assert found.state == "extension"
    assert found.location.startswith(str(environment))
    assert sorted(environment.rglob("*")) == before


@pytest.mark.usefixtures("environment")
def test_an_extension_that_is_loaded_is_not_replaced(monkeypatch):
    monkeypatch.setitem(sys.modules, "DCNv3", types.ModuleType("DCNv3"))
    with pytest.raises(DCNv3Error, match=r"got sys.modules\['DCNv3'\], version unknown"):
        extensions.install()


def test_a_module_outside_of_the_path_is_not_overwritten(tmp_path):
    write(tmp_path, "DCNv3/data.txt")
    with pytest.raises(DCNv3Error, match="is not overwritten"):
        extension_package.write_package(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["DCNv3"]


def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr(extensions, "environment_folder", lambda: tmp_path / "file" / "folder")
    with pytest.raises(DCNv3Error, match=r"cannot be written.*virtual environment.*install\(\)"):
        extensions.install_in_environment()
