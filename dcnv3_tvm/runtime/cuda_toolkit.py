"""Find the parts of the CUDA toolkit: nvcc, NVRTC, headers, runtime library.

They come from the system, a toolkit folder, or NVIDIA's Python packages.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib.util
import os
import shutil
from pathlib import Path
from typing import Final

from dcnv3_tvm.environment import CUDA_HOME
from dcnv3_tvm.errors import MissingDependencyError

VERSION: Final = (13, 0)
"""Oldest supported CUDA. TVM's GPU runtime library is linked against CUDA 13."""

_CUDART: Final = "libcudart.so.13"
_NVRTC: Final = "libnvrtc.so.13"
_DEFAULT_HOME: Final = "/usr/local/cuda"
_HEADERS: Final = ("cuda_fp16.h", "cuda/std/cstdint")


def find_nvcc() -> Path | None:
    """Find nvcc in ``CUDA_HOME``, on the ``PATH`` or in ``/usr/local/cuda``."""
    own = [os.path.join(CUDA_HOME.value, "bin", "nvcc")] if CUDA_HOME.value else []
    for command in (*own, "nvcc", f"{_DEFAULT_HOME}/bin/nvcc"):
        found = shutil.which(command)
        if found is not None:
            return Path(found)
    return None


def find_nvrtc() -> Path | None:
    """Find the runtime compilation library NVRTC."""
    return next(iter(_libraries(_NVRTC)), None)


def find_headers() -> list[Path] | None:
    """Find the include folders NVRTC needs, all from one CUDA installation."""
    for root in _roots():
        folders = [root / "include", root / "include" / "cccl"]
        if all(any((folder / name).exists() for folder in folders) for name in _HEADERS):
            return folders
    return None


def find_cudart() -> str | None:
    """Find the CUDA runtime library: its name if the loader finds it, otherwise its path."""
    found = _cudart()
    return None if found is None else found[0]


def load_cudart() -> ctypes.CDLL:
    """Load the CUDA runtime library, so that TVM's GPU library can link to it by name.

    Raises
    ------
    MissingDependencyError
        If it is not installed.
    """
    found = _cudart()
    if found is None:
        raise MissingDependencyError(
            f"CUDA's runtime library {_CUDART} is not installed",
            hint="Run: pip install 'nvidia-cuda-runtime>=13,<14', or install the CUDA 13 toolkit "
            f"and set {CUDA_HOME.name}.",
        )
    return found[1]


@functools.cache
def _cudart() -> tuple[str, ctypes.CDLL] | None:
    for path in (_CUDART, *map(str, _libraries(_CUDART))):
        with contextlib.suppress(OSError):
            return path, ctypes.CDLL(path)
    return None


def _libraries(name: str) -> list[Path]:
    files = [root / folder / name for root in _roots() for folder in ("lib64", "lib")]
    return [file for file in files if file.is_file()]


def _roots() -> list[Path]:
    """List CUDA installations: NVIDIA's Python packages first, then toolkit folders."""
    spec = importlib.util.find_spec("nvidia")
    packages = [Path(place) for place in (spec and spec.submodule_search_locations) or ()]
    homes = [CUDA_HOME.value] if CUDA_HOME.value else []
    return [
        *(root for package in packages for root in sorted(package.glob("*"))),
        *map(Path, (*homes, _DEFAULT_HOME)),
    ]
