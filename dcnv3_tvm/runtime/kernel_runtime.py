"""TVM's runtime libraries next to compiled kernels, for machines without TVM."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Final

from dcnv3_tvm.errors import INSTALL_TVM, MissingDependencyError
from dcnv3_tvm.runtime import cuda, library
from dcnv3_tvm.runtime.metadata import CUDA_LIBRARY, RUNTIME_LIBRARY

_VERSION: Final = "version.txt"


def copy_runtime(folder: Path) -> None:
    """Copy the runtime libraries of the installed TVM to a folder, with its version.

    Raises
    ------
    MissingDependencyError
        If TVM is not installed.
    OSError
        If they cannot be written.
    """
    installed = library.installed_runtime()
    if installed is None:
        raise _missing(folder)
    path, version = installed
    folder.mkdir(parents=True, exist_ok=True)
    for name in (RUNTIME_LIBRARY, CUDA_LIBRARY):
        shutil.copyfile(path.with_name(name), folder / name)
    (folder / _VERSION).write_text(version, encoding="utf-8")


def load_runtime(folder: Path) -> None:
    """Load the runtime libraries for kernels on a GPU: of the installed TVM, else from a folder.

    Raises
    ------
    MissingDependencyError
        If TVM is not installed, and the folder is not one that `copy_runtime` wrote.
    ArtifactError, TargetError
        As for `dcnv3_tvm.runtime.cuda.load_runtime`.
    """
    installed = library.installed_runtime()
    if installed is not None:
        version = installed[1]
    elif (folder / _VERSION).is_file():
        version = (folder / _VERSION).read_text(encoding="utf-8")
    else:
        raise _missing(folder)
    library.load_runtime(version=version, bundled=folder / RUNTIME_LIBRARY)
    cuda.load_runtime(folder / CUDA_LIBRARY)


def _missing(folder: Path) -> MissingDependencyError:
    return MissingDependencyError(
        f"TVM's runtime libraries are not installed, and not in {folder}", hint=INSTALL_TVM
    )
