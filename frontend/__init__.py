"""PyTorch InternImages in: build them, load their weights, import them into Relax.

Names are loaded when first used, so that importing this package imports neither torch nor tvm.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from dcnv3_tvm.errors import MissingDependencyError

if TYPE_CHECKING:
    from dcnv3_tvm.frontend.checkpoints.load import LoadReport, load_checkpoint
    from dcnv3_tvm.frontend.models.internimage import DCNv3, InternImage
    from dcnv3_tvm.frontend.models.registry import create_model
    from dcnv3_tvm.frontend.models.variants import InternImageConfig, list_models
    from dcnv3_tvm.frontend.torch.importer import import_model

_HOMES = {
    "DCNv3": "models.internimage",
    "InternImage": "models.internimage",
    "InternImageConfig": "models.variants",
    "LoadReport": "checkpoints.load",
    "create_model": "models.registry",
    "import_model": "torch.importer",
    "list_models": "models.variants",
    "load_checkpoint": "checkpoints.load",
}

__all__ = [
    "DCNv3",
    "InternImage",
    "InternImageConfig",
    "LoadReport",
    "create_model",
    "import_model",
    "list_models",
    "load_checkpoint",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        home = importlib.import_module(f"dcnv3_tvm.frontend.{_HOMES[name]}")
    except ModuleNotFoundError as error:
        if error.name not in ("torch", "tvm"):
            raise
        raise MissingDependencyError(
            f"dcnv3_tvm.frontend.{name} needs {error.name}, which is not installed",
            hint="Run: pip install 'dcnv3-tvm[torch]'",
        ) from error
    return getattr(home, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
