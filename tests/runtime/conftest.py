"""The toy artifact, on the disk, and a CUDA that needs no GPU."""

import functools
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from dcnv3_tvm.runtime import toolkit
from dcnv3_tvm.testing.toy import Toy

FAKE_CUDA = Path(__file__).with_name("fake_cuda.c")


@pytest.fixture(scope="session")
def make_toy() -> Callable[..., Toy]:
    return functools.cache(Toy.build)


@pytest.fixture(scope="session")
def toy(make_toy: Callable[..., Toy]) -> Toy:
    return make_toy(1)


@pytest.fixture
def artifact_path(toy: Toy, tmp_path: Path) -> Path:
    return toy.write(tmp_path / "artifact")


@pytest.fixture
def image() -> np.ndarray:
    return np.random.default_rng(1).standard_normal((1, 3, 8, 8)).astype(np.float32)


@pytest.fixture(scope="session")
def gpu_toy(make_toy: Callable[..., Toy]) -> Toy:
    if toolkit.find_nvcc() is None and toolkit.find_nvrtc() is None:
        pytest.skip("needs a compiler for CUDA")
    return make_toy(1, arch="sm_90")


@pytest.fixture
def gpu_artifact(gpu_toy: Toy, tmp_path: Path) -> Path:
    return gpu_toy.write(tmp_path / "gpu-artifact")


@pytest.fixture(scope="session")
def fake_cuda(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a driver and a runtime library of CUDA, both made of `fake_cuda.c`."""
    compiler = shutil.which(os.environ.get("CC", "gcc"))
    if compiler is None:
        pytest.skip("needs a C compiler")
    folder = tmp_path_factory.mktemp("cuda")
    versions, empty = folder / "versions", folder / "empty.c"
    versions.write_text("libcudart.so.13 { local: *; };")
    empty.write_text("")
    common = [compiler, "-shared", "-fPIC", "-w"]
    driver, runtime = folder / "libcuda.so.1", folder / "libcudart.so.13"
    naming = f"-Wl,--no-as-needed,-soname,{runtime.name},--version-script={versions}"
    for command in (
        [*common, "-O1", f"-Wl,-soname,{driver.name}", "-o", driver, FAKE_CUDA],
        [*common, naming, "-o", runtime, empty, driver],
    ):
        subprocess.run(list(map(str, command)), check=True)
    return folder
