"""Where the parts of CUDA are that this library uses: system, toolkit, or NVIDIA's packages."""

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
"""The oldest CUDA that runs with TVM's library, which is made for its major version."""

_CUDART: Final = "libcudart.so.13"
_NVRTC: Final = "libnvrtc.so.13"
_DEFAULT_HOME: Final = "/usr/local/cuda"
_HEADERS: Final = ("cuda_fp16.h", "cuda/std/cstdint")


def find_nvcc() -> Path | None:
    """Find CUDA's compiler: in ``CUDA_HOME``, on the ``PATH`` or in ``/usr/local/cuda``."""
    own = [os.path.join(CUDA_HOME.value, "bin", "nvcc")] if CUDA_HOME.value else []
    for command in (*own, "nvcc", f"{_DEFAULT_HOME}/bin/nvcc"):
        found = shutil.which(command)
        if found is not None:
            return Path(found)
    return None


def find_nvrtc() -> Path | None:
    """Find CUDA's compiler that is a library."""
    return next(iter(_libraries(_NVRTC)), None)


def find_headers() -> list[Path] | None:
    """Find the folders with all headers that NVRTC needs, of one CUDA."""
    for root in _roots():
        folders = [root / "include", root / "include" / "cccl"]
        if all(any((folder / name).exists() for folder in folders) for name in _HEADERS):
            return folders
    return None


def find_cudart() -> str | None:
    """Find CUDA's runtime library: its name where the system finds it, else its path."""
    found = _cudart()
    return None if found is None else found[0]


def cudart() -> ctypes.CDLL:
    """Load CUDA's runtime library; TVM's finds it by its name once it is loaded.

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
    """List the folders that hold libraries and headers of a CUDA: of packages, then of toolkits."""
    spec = importlib.util.find_spec("nvidia")
    packages = [Path(place) for place in (spec and spec.submodule_search_locations) or ()]
    homes = [CUDA_HOME.value] if CUDA_HOME.value else []
    return [
        *(root for package in packages for root in sorted(package.glob("*"))),
        *map(Path, (*homes, _DEFAULT_HOME)),
    ]
