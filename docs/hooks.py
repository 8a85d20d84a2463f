"""What MkDocs does to the pages: notebooks, links to source code, formulas.

- The notebooks of ``examples/`` become pages; ``../examples/NAME.ipynb`` links to them.
- ``[`Class.method`](../FILE.py "code")`` links to the line of FILE that holds ``code``, in the
  definition of that name, on a page with the source. An error unless there is exactly one.
- ``images/page.json`` becomes the page of the gallery, with the package's current script.
- ``$...$`` becomes MathML, which browsers render without a script.
"""

from __future__ import annotations

import ast
import base64
import html
import json
import re
from pathlib import Path
from typing import Any, Final

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import PythonLexer

from dcnv3_tvm.visualize.page import fill_page

ROOT: Final = Path(__file__).resolve().parents[1]
CODE_LINK: Final = re.compile(r'\[`([\w.]+)`\]\(\.\./([\w/]+)\.py\s+"([^"]+)"\)')
FORMULA: Final = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages of the notebooks and of the source code that pages link to."""
    for notebook in sorted((ROOT / "examples").glob("*.ipynb")):
        for name, content in notebook_files(notebook).items():
            files.append(File.generated(config, f"tutorial/{name}", content=content))
    gallery = json.loads((Path(config.docs_dir) / "images/page.json").read_text(encoding="utf-8"))
    page = fill_page(gallery, title="digits_internimage on four digits")
    files.append(File.generated(config, "images/page.html", content=page))
    linked = {
        match[2]
        for page in Path(config.docs_dir).rglob("*.md")
        for match in CODE_LINK.finditer(page.read_text(encoding="utf-8"))
    }
    for path in sorted(linked):
        files.append(File.generated(config, f"source/{path}.md", content=source_page(path)))
    return files


def on_page_markdown(markdown: str, page: Page, **_: object) -> str:
    """Point links to source code and notebooks to their pages."""
    if "/" in page.file.src_uri:
        return markdown
    markdown = CODE_LINK.sub(lambda match: code_link(*match.groups()), markdown)
    return re.sub(r"\]\(\.\./examples/(\w+)\.ipynb", r"](tutorial/\1.md", markdown)


def on_page_content(content: str, **_: object) -> str:
    """Convert formulas to MathML."""

    def formula(match: re.Match[str]) -> str:
        latex = html.unescape(match[3])
        if match[1] == "span":
            return convert(latex)
        style = "overflow-x: auto; padding: 0.4em 0"
        return f'<div style="{style}">{convert(latex, display="block")}</div>'

    return FORMULA.sub(formula, content)


def notebook_files(path: Path) -> dict[str, str | bytes]:
    """Return the page of an executed notebook, and its pictures."""
    parts: list[str] = []
    files: dict[str, str | bytes] = {}
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        text = "".join(cell["source"])
        parts.append(text if cell["cell_type"] == "markdown" else f"```python\n{text}\n```")
        for output in cell.get("outputs", ()):
            if "text" in output:
                parts.append("```text\n{}\n```".format("".join(output["text"]).rstrip()))
                continue
            name = f"{path.stem}-{len(files)}.png"
            files[name] = base64.b64decode(output["data"]["image/png"])
            parts.append(f"![{output['metadata']['alt']}]({name})")
    page = "\n\n".join(parts).replace("](../docs/", "](../")
    files[f"{path.stem}.md"] = re.sub(r"\]\((\w+)\.ipynb", r"](\1.md", page)
    return files


def code_link(name: str, path: str, code: str) -> str:
    """Return a link to the line of a file that holds `code` in the definition of `name`."""
    lines = (ROOT / f"{path}.py").read_text(encoding="utf-8").splitlines()
    scope: Any = ast.parse("\n".join(lines))
    for part in name.split("."):
        found = [child for child in scope.body if part in _names(child)]
        if len(found) != 1:
            raise PluginError(f"{path}.py: no definition of {name}")
        scope = found[0]
    numbers = range(scope.lineno, scope.end_lineno + 1)
    holding = [number for number in numbers if code in lines[number - 1]]
    if len(holding) != 1:
        raise PluginError(f"{path}.py: {len(holding)} lines of {name} hold {code!r}")
    short = name.rpartition(".")[2]
    return f'[`{short}`](source/{path}.md#line-{holding[0]} "{path}.py, line {holding[0]}")'


def _names(statement: Any) -> list[str]:
    """Return the names that a statement defines or assigns."""
    if hasattr(statement, "name"):
        return [statement.name]
    targets = getattr(statement, "targets", [getattr(statement, "target", None)])
    return [target.id for target in targets if isinstance(target, ast.Name)]


def source_page(path: str) -> str:
    """Return a page with a source file, whose lines can be linked to."""
    code = (ROOT / f"{path}.py").read_text(encoding="utf-8")
    formatter = HtmlFormatter(cssclass="highlight", linespans="line")
    style = ".highlight span:target { background: #ffd54f66; }"
    listing = highlight(code, PythonLexer(), formatter)
    return f"# `{path}.py`\n\n<style>{style}</style>\n\n{listing}"
