"""Build InternImage in PyTorch, load its weights, and import PyTorch and ONNX models into Relax.

Names are loaded on first use, so that importing this package imports neither torch nor tvm.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from dcnv3_tvm.lazy_names import lazy_names

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


__getattr__, __dir__ = lazy_names(__name__, _MODULES)
