"""The toy artifact, for the CPU and for the emulated GPU."""

import functools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import emulated_gpu
from helpers.toy import Toy


@pytest.fixture(scope="session")
def make_toy() -> Callable[..., Toy]:
    return functools.cache(Toy.build)


@pytest.fixture(scope="session")
def toy(make_toy: Callable[..., Toy]) -> Toy:
    return make_toy(1)


@pytest.fixture
def artifact_path(toy: Toy, tmp_path: Path) -> Path:
    return toy.write(tmp_path / "artifact")


@pytest.fixture(params=["own pool", "TVM's pool"])
def either_artifact_path(
    request: pytest.FixtureRequest, make_toy: Callable[..., Toy], tmp_path: Path
) -> Path:
    """The toy artifact, with the thread pool of this package and without it."""
    pooled = request.param == "own pool"
    return make_toy(1, pooled=pooled).write(tmp_path / "artifact")


@pytest.fixture
def image() -> np.ndarray:
    return np.random.default_rng(1).standard_normal((1, 3, 8, 8)).astype(np.float32)


@pytest.fixture(scope="session")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Environment of a process with the emulated GPU."""
    return emulated_gpu.install(tmp_path_factory.mktemp("cuda"))


@pytest.fixture
def gpu_artifact(
    emulated: dict[str, str],
    make_toy: Callable[..., Toy],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> Path:
    """The toy artifact for the emulated GPU, which the test also compiles for."""
    monkeypatch.setenv("CUDA_HOME", emulated["CUDA_HOME"])
    return make_toy(1, arch="sm_90").write(tmp_path / "gpu-artifact")
