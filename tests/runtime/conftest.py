"""The toy artifact, on the disk."""

import functools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from dcnv3_tvm.testing.toy import Toy


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
