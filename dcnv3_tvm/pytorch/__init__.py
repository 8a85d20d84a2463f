"""DCNv3 for people who stay in PyTorch.

`DCNv3` is loaded on first use, so that importing this package does not import torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from dcnv3_tvm.lazy_names import lazy_names

if TYPE_CHECKING:
    from dcnv3_tvm.pytorch.dcnv3_module import DCNv3

_MODULES = {"DCNv3": "dcnv3_tvm.pytorch.dcnv3_module"}

__all__ = ["DCNv3"]


__getattr__, __dir__ = lazy_names(__name__, _MODULES)
