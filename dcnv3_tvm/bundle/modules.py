"""The modules of this package that run an artifact."""

from __future__ import annotations

import ast
import importlib.util
from pathlib import Path
from typing import Final

PACKAGE: Final = "dcnv3_tvm"
_ROOT: Final = f"{PACKAGE}.runtime"


def runtime_modules() -> dict[str, Path]:
    """Return the files of `dcnv3_tvm.runtime` and of what it imports, by their paths in a folder.

    Examples
    --------
    >>> files = runtime_modules()
    >>> "dcnv3_tvm/runtime/loading.py" in files, "dcnv3_tvm/compiler/compile.py" in files
    (True, False)
    """
    found: dict[str, Path] = {}
    queue = {_ROOT}
    while queue:
        name = queue.pop()
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None or name in found:
            continue
        found[name] = Path(spec.origin)
        # A package is imported before its modules.
        queue |= {name.rpartition(".")[0] or PACKAGE} | _imports(found[name])
    return {_path(name, file): file for name, file in sorted(found.items())}


def _path(name: str, file: Path) -> str:
    parts = name.split(".")
    return "/".join([*parts, file.name] if file.name == "__init__.py" else [*parts[:-1], file.name])


def _imports(file: Path) -> set[str]:
    """Return the modules of this package that a file imports at run time, anywhere."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module is not None:
            # A name may be a module, or something in one.
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return {name for name in names if name.partition(".")[0] == PACKAGE and _is_module(name)}


def _is_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # Its parent is a module, not a package.
        return False
