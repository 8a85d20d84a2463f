"""Python processes that cannot import PyTorch."""

from __future__ import annotations

import os
from pathlib import Path


def environment_without_torch(folder: Path) -> dict[str, str]:
    """Return this environment, with a module in `folder` that shadows PyTorch.

    TVM imports PyTorch where it is installed, which takes seconds in each process.
    """
    (folder / "torch.py").write_text("raise ImportError\n")
    paths = [str(folder), os.environ.get("PYTHONPATH", "")]
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
