"""The tutorial: its cells run and agree with the library, and the notebooks hold these cells."""

import importlib.util
import json
from pathlib import Path

import matplotlib.pyplot as plt
import pytest
import torch

from dcnv3_tvm.bench import cpu_peaks
from dcnv3_tvm.bench.roofline import Peaks

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"

SMALL = {
    "operator_step_by_step.py": {"SHAPE": (2, 20, 24, 64)},
    "encoder_step_by_step.py": {"IMAGES": (1, 3, 40, 64)},
    "compiler_step_by_step.py": {"SHAPE": (1, 13, 10, 64)},
}


def load(path: Path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


notebooks = load(EXAMPLES / "make_notebooks.py")


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Execute a source elsewhere, without windows and without changing PyTorch's settings."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(notebooks, "DOTS_PER_INCH", 20)
    # Measuring takes seconds, and sets the number of threads of this process.
    monkeypatch.setattr(cpu_peaks, "measure_peaks", lambda _: Peaks(1e11, 1e10, how="given"))
    plt.switch_backend("Agg")

    def execute(name: str, parameters: dict):
        with torch.random.fork_rng(devices=[]):
            return notebooks.execute(EXAMPLES / name, parameters)

    yield execute
    assert not list(tmp_path.iterdir())


def check_outputs(cells: list[dict]) -> None:
    outputs = [output for cell in cells for output in cell.get("outputs", ())]
    pictures = [output for output in outputs if output["output_type"] == "display_data"]
    assert len(pictures) >= 2
    assert all(picture["metadata"]["alt"] for picture in pictures)
    assert any("relative difference" in "".join(output.get("text", ())) for output in outputs)


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_small(name: str, run):
    check_outputs(run(name, SMALL[name]))


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_as_published(name: str, run):
    check_outputs(run(name, {}))


def test_each_source_is_a_notebook_with_these_cells():
    assert [source.name for source in notebooks.SOURCES] == list(SMALL)
    for source in notebooks.SOURCES:
        path = source.with_suffix(".ipynb")
        assert path.stat().st_size < 1.5e6, f"{path.name} is large"
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        written = [(cell["cell_type"], "".join(cell["source"])) for cell in cells]
        wanted = [(cell.kind, cell.text) for cell in notebooks.read_cells(source)]
        assert written == wanted, f"run python examples/make_notebooks.py {source.name}"
        check_outputs(cells)


def test_links_to_code_name_one_line():
    hooks = load(ROOT / "docs" / "hooks.py")
    path, name = "dcnv3_tvm/op/reference", "dcnv3_loops"
    link = hooks.code_link(name, path, "math.floor(pos_y)")
    line = int(link.partition("#line-")[2].partition(" ")[0])
    assert "math.floor(pos_y)" in (ROOT / f"{path}.py").read_text().splitlines()[line - 1]
    assert "#line-" in hooks.code_link("Corner.pixel", path, "pixel")
    for name, code, message in (
        ("dcnv3_loop", "math", "no definition of dcnv3_loop"),
        ("dcnv3_loops", "math.sin", "0 lines of dcnv3_loops"),
        ("dcnv3_loops", "spec.pad", "2 lines of dcnv3_loops"),
    ):
        with pytest.raises(hooks.PluginError, match=message):
            hooks.code_link(name, path, code)
