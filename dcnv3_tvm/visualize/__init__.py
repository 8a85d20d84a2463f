"""Look at where a model samples: offsets, masks and receptive fields, in arrays and pictures.

Names are loaded on first use, so that artifacts are looked at without PyTorch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from dcnv3_tvm.lazy_names import lazy_names

if TYPE_CHECKING:
    from dcnv3_tvm.visualize.block_sampling import BlockSampling
    from dcnv3_tvm.visualize.capture import capture_sampling
    from dcnv3_tvm.visualize.page import render_page
    from dcnv3_tvm.visualize.photo import photo_of
    from dcnv3_tvm.visualize.pictures import PICTURES, draw_picture, save_picture
    from dcnv3_tvm.visualize.receptive_fields import receptive_field

_MODULES = {
    "PICTURES": "dcnv3_tvm.visualize.pictures",
    "BlockSampling": "dcnv3_tvm.visualize.block_sampling",
    "capture_sampling": "dcnv3_tvm.visualize.capture",
    "draw_picture": "dcnv3_tvm.visualize.pictures",
    "save_picture": "dcnv3_tvm.visualize.pictures",
    "photo_of": "dcnv3_tvm.visualize.photo",
    "receptive_field": "dcnv3_tvm.visualize.receptive_fields",
    "render_page": "dcnv3_tvm.visualize.page",
}

__all__ = [
    "PICTURES",
    "BlockSampling",
    "capture_sampling",
    "draw_picture",
    "photo_of",
    "receptive_field",
    "render_page",
    "save_picture",
]

__getattr__, __dir__ = lazy_names(__name__, _MODULES)
