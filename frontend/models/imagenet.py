"""ImageNet-1k's class names, from torchvision (see LICENSE-torchvision)."""

from __future__ import annotations

import functools
import importlib.resources
from typing import Final

IMAGENET_CLASSES: Final = 1000


@functools.cache
def imagenet_labels() -> tuple[str, ...]:
    """Return the names of ImageNet-1k's classes in the order of the published models."""
    package = importlib.resources.files("dcnv3_tvm.frontend.models")
    return tuple((package / "imagenet_classes.txt").read_text(encoding="utf-8").splitlines())
