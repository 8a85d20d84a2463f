"""Content and metadata of the wheel and the source distribution."""

import importlib.metadata
import importlib.resources
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

from dcnv3_tvm import errors

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[2]
SOURCES = {
    "dcnv3_tvm": "dcnv3_tvm",
    "dcnv3_tvm/schedules": "schedules",
    "dcnv3_tvm/frontend": "frontend",
}
"""Folders of the package and of the repository."""

IGNORED = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__", "*.py[cod]")

BUILD = "import sys; from setuptools import build_meta; build_meta.build_{}(sys.argv[1])"


def package_files() -> set[str]:
    return {
        f"{package}/{path.relative_to(ROOT / folder).as_posix()}"
        for package, folder in SOURCES.items()
        for path in (ROOT / folder).rglob("*.py")
    }


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build both distributions offline, from a copy of the sources."""
    folder = tmp_path_factory.mktemp("packaging")
    copy = folder / "sources"
    shutil.copytree(ROOT, copy, ignore=IGNORED)
    shutil.copytree(ROOT / ".ci", copy / ".ci")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    for kind in ("sdist", "wheel"):
        command = [sys.executable, "-c", BUILD.format(kind), str(folder)]
        done = subprocess.run(
            command, cwd=copy, env=environment, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def wheel(built: Path) -> zipfile.ZipFile:
    (path,) = built.glob("*.whl")
    return zipfile.ZipFile(path)


@pytest.fixture(scope="module")
def sdist_names(built: Path) -> set[str]:
    (path,) = built.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        return {name.partition("/")[2] for name in archive.getnames()}


def test_package_list_matches_folders():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    listed = settings["tool"]["setuptools"]["packages"]
    folders = {path.rpartition("/")[0].replace("/", ".") for path in package_files()}
    assert listed == sorted(folders)


def test_every_folder_with_modules_is_a_package():
    files = package_files()
    folders = {path.rpartition("/")[0] for path in files}
    assert {f"{folder}/__init__.py" for folder in folders} <= files


def test_wheel_holds_modules_and_data_files_only(wheel: zipfile.ZipFile):
    names = {name for name in wheel.namelist() if ".dist-info/" not in name}
    targets = {path.name for path in (ROOT / "schedules" / "records").iterdir()}
    assert targets
    names_of_classes = "dcnv3_tvm/frontend/models/imagenet_classes.txt"
    page = {f"dcnv3_tvm/visualize/page.{suffix}" for suffix in ("css", "html", "js")}
    linked = {
        f"dcnv3_tvm/compiler/{file}"
        for file in ("linux/thread_pool.c", "windows/stack_probe.s", "windows/tvm_ffi.def")
    }
    data = {"dcnv3_tvm/py.typed", names_of_classes, *page, *linked} | {
        f"dcnv3_tvm/schedules/records/{target}/{file}"
        for target in targets
        for file in ("about.json", "records.jsonl")
    }
    assert names == package_files() | data


@pytest.mark.parametrize("part", ["test_", "tests/", "conftest", "emulated", "results", "helpers"])
def test_wheel_has_no_tests_emulator_or_results(wheel: zipfile.ZipFile, part: str):
    assert not [name for name in wheel.namelist() if part in name]


def test_wheel_metadata(wheel: zipfile.ZipFile):
    import dcnv3_tvm

    (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    metadata = Parser().parsestr(wheel.read(name).decode())
    assert metadata["Name"] == "dcnv3-tvm"
    assert metadata["Version"] == dcnv3_tvm.__version__
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.10"
    assert [name for name in wheel.namelist() if name.endswith("/LICENSE")]
    (name,) = (name for name in wheel.namelist() if name.endswith("/entry_points.txt"))
    assert "dcnv3-tvm = dcnv3_tvm.__main__:main" in wheel.read(name).decode()


def test_required_packages_are_light(wheel: zipfile.ZipFile):
    (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    required = Parser().parsestr(wheel.read(name).decode()).get_all("Requires-Dist")
    assert required is not None
    always = [line for line in required if "extra ==" not in line]
    assert not [line for line in always if line.startswith(("torch", "onnx", "scikit", "pytest"))]


def test_hints_install_the_required_tvm():
    required = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    tvm, ffi = (name for name in required if name.startswith("apache-tvm"))
    assert f'Run: pip install "{ffi}"' == errors.INSTALL_FFI
    assert f"{errors.INSTALL_FFI} {tvm}" == errors.INSTALL_TVM
    # tvm-ffi 0.1.15 crashes in TVM 0.27's JSON reader and writer.
    assert ffi.endswith(",<0.1.15")


def test_sdist_holds_sources_tests_and_tools(sdist_names: set[str]):
    needed = {"LICENSE", "Makefile", "MANIFEST.in", "README.md", "CHANGELOG.md", "CONTRIBUTING.md"}
    needed |= {"pyproject.toml", ".ci/run", "tests/project/test_packaging.py"}
    for folder in ("tests", "examples", "benchmarks", "dcnv3_tvm", "schedules", "frontend"):
        files = {path.relative_to(ROOT).as_posix() for path in (ROOT / folder).rglob("*.py")}
        assert files, folder
        needed |= files
    assert needed <= sdist_names
    assert not [name for name in sdist_names if "__pycache__" in name]


def test_installed_version_matches_source():
    import dcnv3_tvm

    assert importlib.metadata.version("dcnv3-tvm") == dcnv3_tvm.__version__


def test_mapped_folders_are_importable_resources():
    for name in ("schedules", "frontend"):
        folder = importlib.resources.files(f"dcnv3_tvm.{name}")
        assert folder.joinpath("__init__.py").is_file()
