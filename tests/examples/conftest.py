"""The toy artifact with a dynamic batch, and images for it."""

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from helpers.toy import Toy


@pytest.fixture(scope="session")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Toy.build("n").write(tmp_path_factory.mktemp("examples") / "artifact")


@pytest.fixture(scope="session")
def make_image() -> Callable[..., bytes]:
    """Make the content of an image file; every seed gives another one."""

    def make(seed: int, size: tuple[int, int] = (9, 11), kind: str = "PNG") -> bytes:
        pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)
        file = io.BytesIO()
        PIL.Image.fromarray(pixels).save(file, kind)
        return file.getvalue()

    return make
