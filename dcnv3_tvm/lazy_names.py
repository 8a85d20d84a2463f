"""Public names of a package that are imported on first use."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping
from typing import Any, Final

from dcnv3_tvm.errors import MissingDependencyError, raise_if_tvm_is_missing

_EXTRAS: Final = {"torch": "torch", "onnx": "onnx", "onnx_ir": "onnx", "onnxscript": "onnx"}
"""Packages that a name may need, and the extra that installs each."""


def lazy_names(
    package: str, modules: Mapping[str, str]
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Return ``__getattr__`` and ``__dir__`` of a package.

    Parameters
    ----------
    package : str
        Its name.
    modules : mapping of str to str
        Public names, and the modules that define them.
    """
    namespace = vars(sys.modules[package])

    def load(name: str) -> Any:
        if name not in modules:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        try:
            module = importlib.import_module(modules[name])
        except ModuleNotFoundError as error:
            raise_if_tvm_is_missing(error, f"{package}.{name}")
            extra = _EXTRAS.get(str(error.name))
            if extra is None:
                raise
            raise MissingDependencyError(
                f"{package}.{name} needs {error.name}, which is not installed",
                hint=f'Run: pip install "dcnv3-tvm[{extra}]"',
            ) from error
        value = namespace[name] = getattr(module, name)  # Later uses do not come here.
        return value

    def names() -> list[str]:
        return sorted({*namespace, *modules})

    return load, names
