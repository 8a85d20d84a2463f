"""Build InternImage in PyTorch, load its weights, and import PyTorch and ONNX models into Relax.

Names are loaded on first use, so that importing this package imports neither torch nor tvm.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from dcnv3_tvm.errors import MissingDependencyError

if TYPE_CHECKING:
    from dcnv3_tvm.frontend.checkpoints.load import load_checkpoint
    from dcnv3_tvm.frontend.checkpoints.report import LoadReport
    from dcnv3_tvm.frontend.factory import create_model
    from dcnv3_tvm.frontend.models.config import InternImageConfig
    from dcnv3_tvm.frontend.models.internimage import InternImage
    from dcnv3_tvm.frontend.models.variants import list_models
    from dcnv3_tvm.frontend.onnx.export import export_onnx
    from dcnv3_tvm.frontend.onnx.importer import import_onnx
    from dcnv3_tvm.frontend.torch.importer import import_model
    from dcnv3_tvm.pytorch.dcnv3_module import DCNv3

_MODULES = {
    "DCNv3": "dcnv3_tvm.pytorch.dcnv3_module",
    "InternImage": "dcnv3_tvm.frontend.models.internimage",
    "InternImageConfig": "dcnv3_tvm.frontend.models.config",
    "LoadReport": "dcnv3_tvm.frontend.checkpoints.report",
    "create_model": "dcnv3_tvm.frontend.factory",
    "export_onnx": "dcnv3_tvm.frontend.onnx.export",
    "import_model": "dcnv3_tvm.frontend.torch.importer",
    "import_onnx": "dcnv3_tvm.frontend.onnx.importer",
    "list_models": "dcnv3_tvm.frontend.models.variants",
    "load_checkpoint": "dcnv3_tvm.frontend.checkpoints.load",
}

_EXTRAS = {
    "torch": "torch",
    "tvm": "torch",
    "onnx": "onnx",
    "onnx_ir": "onnx",
    "onnxscript": "onnx",
}
"""Packages that a name may need, and what they are installed with."""

__all__ = [
    "DCNv3",
    "InternImage",
    "InternImageConfig",
    "LoadReport",
    "create_model",
    "export_onnx",
    "import_model",
    "import_onnx",
    "list_models",
    "load_checkpoint",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        module = importlib.import_module(_MODULES[name])
    except ModuleNotFoundError as error:
        extra = _EXTRAS.get(str(error.name))
        if extra is None:
            raise
        raise MissingDependencyError(
            f"dcnv3_tvm.frontend.{name} needs {error.name}, which is not installed",
            hint=f"Run: pip install 'dcnv3-tvm[{extra}]'",
        ) from error
    return getattr(module, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
