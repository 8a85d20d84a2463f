"""DCNv3 for people who stay in PyTorch.

`DCNv3` is loaded on first use, so that importing this package does not import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from dcnv3_tvm.errors import MissingDependencyError

if TYPE_CHECKING:
    from dcnv3_tvm.pytorch.dcnv3_module import DCNv3

_MODULES = {"DCNv3": "dcnv3_tvm.pytorch.dcnv3_module"}

__all__ = ["DCNv3"]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        module = importlib.import_module(_MODULES[name])
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise MissingDependencyError(
            f"dcnv3_tvm.pytorch.{name} needs PyTorch, which is not installed",
            hint="Run: pip install 'dcnv3-tvm[torch]'",
        ) from error
    return getattr(module, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
