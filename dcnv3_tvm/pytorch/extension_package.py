"""The installed package that stands in for the published CUDA extension ``DCNv3``.

It is a module of three lines that imports `dcnv3_tvm.pytorch.published_extension`, and the metadata
by which ``importlib.metadata``, ``pkg_resources`` and pip find the distribution.
"""

from __future__ import annotations

import base64
import hashlib
import importlib.metadata
import shutil
from pathlib import Path
from typing import Final

from dcnv3_tvm.errors import DCNv3Error
from dcnv3_tvm.files import atomic_folder

MODULE: Final = "DCNv3"
"""Name of the extension's module and of its distribution."""

VERSION: Final = "1.1"
"""The published version whose functions take `remove_center`."""

INSTALLER: Final = "dcnv3-tvm"

_DIST_INFO: Final = f"{MODULE}-{VERSION}.dist-info"

_FILES: Final = {
    f"{MODULE}/__init__.py": '"""The functions of the published CUDA extension, computed by '
    'dcnv3-tvm."""\n\nfrom dcnv3_tvm.pytorch.published_extension import dcnv3_backward, '
    'dcnv3_forward\n\n__all__ = ["dcnv3_backward", "dcnv3_forward"]\n',
    f"{_DIST_INFO}/INSTALLER": f"{INSTALLER}\n",
    f"{_DIST_INFO}/METADATA": f"Metadata-Version: 2.1\nName: {MODULE}\nVersion: {VERSION}\n"
    "Summary: Stand-in for the published CUDA extension, computed by dcnv3-tvm\n"
    "Requires-Dist: dcnv3-tvm\n",
}


def is_stand_in(distribution: importlib.metadata.Distribution) -> bool:
    """Whether a distribution was written by `write_package`."""
    return (distribution.read_text("INSTALLER") or "").strip() == INSTALLER


def holds_stand_in(folder: Path) -> bool:
    """Whether a folder holds the package, or a part of it that was left."""
    metadata = folder / _DIST_INFO
    return metadata.is_dir() and is_stand_in(importlib.metadata.Distribution.at(metadata))


def write_package(folder: Path) -> None:
    """Write module and metadata into a folder of ``sys.path``, each whole or not at all.

    Raises
    ------
    DCNv3Error
        If the folder cannot be written, or holds another module of this name.
    """
    if (folder / MODULE).exists() and not holds_stand_in(folder):
        raise DCNv3Error(
            f"a module {MODULE} that is not this library's exists, and is not overwritten",
            got=folder / MODULE,
            hint="Uninstall that module, or use an environment without it.",
        )
    record = [
        f"{name},sha256={_digest(text)},{len(text.encode())}" for name, text in _FILES.items()
    ]
    record.append(f"{_DIST_INFO}/RECORD,,\n")
    files = {**_FILES, f"{_DIST_INFO}/RECORD": "\n".join(record)}
    try:
        # The metadata is first, because it tells whose the module is.
        for part in (_DIST_INFO, MODULE):
            with atomic_folder(folder / part) as temporary:
                for name, text in files.items():
                    if name.startswith(f"{part}/"):
                        (temporary / Path(name).name).write_text(text, encoding="utf-8")
    except OSError as error:
        raise DCNv3Error(
            f"the stand-in for {MODULE} cannot be written",
            got=f"{error.strerror} ({folder})",
            allowed="a folder of Python packages that you may write, as in a virtual environment",
            hint="Or call dcnv3_tvm.pytorch.extensions.install() at the start of your script.",
        ) from error


def delete_package(folder: Path) -> None:
    """Delete what `write_package` wrote, if it is there.

    Raises
    ------
    DCNv3Error
        If the folder cannot be written.
    """
    parts = (MODULE, _DIST_INFO) if holds_stand_in(folder) else ()
    try:
        for part in parts:
            if (folder / part).exists():
                shutil.rmtree(folder / part)
    except OSError as error:
        raise DCNv3Error(
            f"the stand-in for {MODULE} cannot be deleted", got=f"{error.strerror} ({folder})"
        ) from error


def _digest(text: str) -> str:
    """Return the digest of a file in the encoding of RECORD."""
    digest = hashlib.sha256(text.encode()).digest()
    return base64.urlsafe_b64encode(digest).rstrip(b"=").decode()
