"""No files of the package import one another, not even inside functions."""

import ast
import graphlib
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = {
    "dcnv3_tvm": ROOT / "dcnv3_tvm",
    "dcnv3_tvm.schedules": ROOT / "schedules",
    "dcnv3_tvm.frontend": ROOT / "frontend",
}


def modules() -> dict[str, Path]:
    found = {}
    for package, folder in FOLDERS.items():
        for path in folder.rglob("*.py"):
            parts = path.relative_to(folder).with_suffix("").parts
            found[".".join((package, *parts)).removesuffix(".__init__")] = path
    return found


def runtime_nodes(tree: ast.AST) -> Iterator[ast.AST]:
    """Walk a tree without the blocks that only type checkers run."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        yield node
        yield from runtime_nodes(node)


def imports(source: str, names: set[str]) -> set[str]:
    found = set()
    for node in runtime_nodes(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            members = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= members if members <= names else {node.module, *members}
    return found & names


def test_imports_are_read():
    checked = "if TYPE_CHECKING:\n    import a.x\n"
    source = checked + "def f():\n    from a import b, c\nfrom a.b import d"
    assert imports(source, {"a", "a.b", "a.x"}) == {"a", "a.b"}


def test_files_do_not_import_one_another():
    paths = modules()
    assert {"dcnv3_tvm", "dcnv3_tvm.spec", "dcnv3_tvm.schedules.gpu"} <= paths.keys()
    graph = {
        name: imports(path.read_text(encoding="utf-8"), set(paths)) - {name}
        for name, path in paths.items()
    }
    graphlib.TopologicalSorter(graph).prepare()
