"""Every Python and shell block of README and docs runs, on a tiny model, unless it is marked."""

import dataclasses
import re
import shlex
import shutil
from pathlib import Path

import pytest
from sklearn.datasets import load_sample_images

from dcnv3_tvm import cli
from dcnv3_tvm.runtime import cuda_toolkit

ROOT = Path(__file__).resolve().parents[2]
PAGES = [
    path.relative_to(ROOT)
    for path in (
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        *sorted((ROOT / "docs").rglob("*.md")),
    )
]
FENCE = re.compile(
    r"(?:^<!-- not run: (?P<reason>.+?) -->\n)?^```(?P<language>\w+).*\n(?P<code>[\s\S]*?)^```$",
    re.MULTILINE,
)
RUN = ("python", "sh")


@dataclasses.dataclass
class Block:
    language: str
    code: str
    reason: str | None

    @property
    def runs(self) -> bool:
        return self.language in RUN and self.reason is None

    @property
    def small(self) -> "Block":
        """The block with a model and a tuning session that take seconds."""
        code = re.sub(r"\binternimage_t\b", "test_internimage_pre_norm", self.code)
        code = code.replace("224, 224", "32, 32").replace("--minutes 5", "--trials 8")
        return dataclasses.replace(self, code=code)

    @property
    def commands(self) -> list[list[str]]:
        """The words of each command line of a shell block."""
        lines = self.code.replace("\\\n", " ").splitlines()
        return [shlex.split(line, comments=True) for line in lines]


def blocks(page: Path) -> list[Block]:
    text = (ROOT / page).read_text(encoding="utf-8")
    return [Block(m["language"], m["code"], m["reason"]) for m in FENCE.finditer(text)]


PAGES_THAT_RUN = [page for page in PAGES if any(block.runs for block in blocks(page))]


@pytest.mark.slow
@pytest.mark.usefixtures("unoptimized")
@pytest.mark.parametrize("page", PAGES_THAT_RUN, ids=str)
def test_blocks_run_in_order(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    found = [block for block in blocks(page) if block.runs]
    if any("cuda" in block.code for block in found) and cuda_toolkit.find_nvcc() is None:
        pytest.skip("the page compiles for a GPU, which takes nvcc")
    monkeypatch.chdir(tmp_path)
    shutil.copy(load_sample_images().filenames[0], tmp_path / "photo.jpg")
    names: dict[str, object] = {}
    for block in found:
        if block.language == "python":
            exec(compile(block.small.code, str(page), "exec"), names)
            continue
        for program, *arguments in block.small.commands:
            assert program == "dcnv3-tvm"
            assert cli.main(arguments) == 0, (arguments, capsys.readouterr().err)
            assert capsys.readouterr().out, arguments


def test_every_block_names_a_language():
    for page in PAGES:
        text = (ROOT / page).read_text(encoding="utf-8")
        assert text.count("\n```") == 2 * len(blocks(page)), page


def test_each_verb_is_shown():
    shown = {
        command[1]
        for page in PAGES
        for block in blocks(page)
        if block.language == "sh"
        for command in block.commands
        if command[:1] == ["dcnv3-tvm"]
    }
    assert shown == set(cli.VERBS)


def test_files_that_are_named_exist():
    pattern = r"`((?:dcnv3_tvm|schedules|frontend|tests|benchmarks|examples)/[\w./]+?\.(?:py|md))`"
    for page in PAGES:
        for name in re.findall(pattern, (ROOT / page).read_text(encoding="utf-8")):
            assert (ROOT / name).is_file(), f"{page}: {name}"


def test_links_of_readme_and_contributing_exist():
    for page in ("README.md", "CONTRIBUTING.md"):
        for target in re.findall(r"\]\(([^)#]+)", (ROOT / page).read_text(encoding="utf-8")):
            assert "://" in target or (ROOT / target).is_file(), f"{page}: {target}"


def test_readme_and_contributing_are_short():
    for page, words in (("README.md", 900), ("CONTRIBUTING.md", 600)):
        assert len((ROOT / page).read_text(encoding="utf-8").split()) <= words, page


def test_make_commands_exist():
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for page in PAGES:
        for command in re.findall(r"^make (\w+)", (ROOT / page).read_text(), re.MULTILINE):
            assert command in targets, f"{page}: make {command}"
