"""Look at where a model samples: offsets, masks and receptive fields, in arrays and pictures.

Names are loaded on first use, so that artifacts are looked at without PyTorch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dcnv3_tvm.visualize.block_sampling import BlockSampling
    from dcnv3_tvm.visualize.capture import capture_sampling
    from dcnv3_tvm.visualize.receptive_fields import receptive_field

_MODULES = {
    "BlockSampling": "dcnv3_tvm.visualize.block_sampling",
    "capture_sampling": "dcnv3_tvm.visualize.capture",
    "receptive_field": "dcnv3_tvm.visualize.receptive_fields",
}

__all__ = [
    "BlockSampling",
    "capture_sampling",
    "receptive_field",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
