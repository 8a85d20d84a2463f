"""The command line, called in this process, and its inputs."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sklearn.datasets import load_sample_images

from dcnv3_tvm.cli import main
from helpers.toy import Toy


@dataclasses.dataclass(frozen=True)
class Outcome:
    code: int
    out: str
    err: str

    @property
    def data(self) -> Any:
        return json.loads(self.out)


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    def call(*arguments: object) -> Outcome:
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 1
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        return Outcome(code, captured.out, captured.err)

    return call


@pytest.fixture(scope="session")
def toy() -> Toy:
    return Toy.build()


@pytest.fixture
def artifact_path(toy: Toy, tmp_path: Path) -> Path:
    return toy.write(tmp_path / "artifact")


@pytest.fixture(scope="session")
def photo() -> Path:
    names = load_sample_images().filenames
    return next(Path(name) for name in names if name.endswith("china.jpg"))
