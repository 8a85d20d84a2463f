"""Write a bundle: an artifact, the modules that run it, a script, and a Dockerfile."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
from pathlib import Path
from typing import Final

from dcnv3_tvm import checks, files
from dcnv3_tvm.bundle import texts
from dcnv3_tvm.bundle.modules import PACKAGE, runtime_modules
from dcnv3_tvm.digests import digest_of_file
from dcnv3_tvm.errors import ArtifactError, os_reason
from dcnv3_tvm.runtime.loading import read_metadata
from dcnv3_tvm.runtime.metadata import CARD, LIBRARY, METADATA, WEIGHTS, ArtifactMetadata

ARTIFACT: Final = "artifact"
_SCRIPT: Final = "run.py"
_REQUIREMENTS: Final = "requirements.txt"
_DOCKERFILE: Final = "Dockerfile"
_DOCKER_IGNORE: Final = ".dockerignore"
_LICENSE: Final = "LICENSE"

_REQUIRED: Final = frozenset({ARTIFACT, PACKAGE, _SCRIPT, _REQUIREMENTS})
_NAMES: Final = _REQUIRED | {_DOCKERFILE, CARD}


def write(path: str | os.PathLike[str], destination: str | os.PathLike[str]) -> dict[str, int]:
    """Write a folder with all that runs an artifact on a machine that has only Python.

    Parameters
    ----------
    path : str or path
        The artifact; it may be for another machine than this one.
    destination : str or path
        The folder. A bundle in it is replaced, and unchanged if writing fails.

    Returns
    -------
    dict of str to int
        Bytes of each part.

    Raises
    ------
    ArtifactError
        If the artifact is missing, damaged or incomplete, or has no runtime library; if
        `destination` holds something else or cannot be written.
    MissingDependencyError
        If a package whose version the bundle would pin is not installed.
    """
    source, folder = checks.path("path", path), checks.path("destination", destination)
    metadata = read_metadata(source)
    checks.outside("the bundle", folder, source)
    files.check_replaceable(folder, "a bundle", required=_REQUIRED, allowed=_NAMES)
    if not metadata.libraries:
        raise ArtifactError(
            "the artifact was compiled without TVM's runtime library, so a bundle would not run",
            got=source,
            hint="Compile it with --runtime-wheel FILE.",
        )
    requirements = texts.requirements(metadata)
    try:
        with files.atomic_folder(folder) as temporary:
            _copy_artifact(source, temporary / ARTIFACT, metadata)
            for name, file in runtime_modules().items():
                (temporary / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, temporary / name)
            shutil.copyfile(Path(__file__).with_name(_SCRIPT), temporary / _SCRIPT)
            shutil.copyfile(_licence(), temporary / PACKAGE / _LICENSE)
            (temporary / _REQUIREMENTS).write_text(requirements, encoding="utf-8")
            if texts.is_for_linux(metadata):
                (temporary / _DOCKERFILE).write_text(texts.dockerfile(), encoding="utf-8")
                # The README makes an environment there.
                (temporary / _DOCKER_IGNORE).write_text(".venv\n", encoding="utf-8")
            sizes = {
                **{
                    f"{ARTIFACT}/{name}": _size(temporary / ARTIFACT / name)
                    for name in (WEIGHTS, LIBRARY, *metadata.libraries)
                },
                PACKAGE: _size(temporary / PACKAGE),
            }
            (temporary / CARD).write_text(texts.readme(metadata, sizes), encoding="utf-8")
            return sizes
    except OSError as error:
        raise ArtifactError(
            "the bundle cannot be written",
            got=os_reason(error, folder),
            hint=f"{folder} is unchanged.",
        ) from error


def _copy_artifact(source: Path, destination: Path, metadata: ArtifactMetadata) -> None:
    destination.mkdir()
    for name in (*metadata.digests, CARD, METADATA):
        if not (source / name).is_file():
            raise ArtifactError(f"the artifact is incomplete: it has no {name}", got=source)
        shutil.copyfile(source / name, destination / name)
        digest = metadata.digests.get(name)
        if digest is not None and digest_of_file(destination / name) != digest:
            raise ArtifactError(
                f"{name} was modified after it was written",
                got=source,
                hint="Copy the artifact again, or compile the model again.",
            )


def _licence() -> Path:
    """Return the file of this package's licence, of an installed package or a clone."""
    listed = importlib.metadata.files("dcnv3-tvm") or []
    return Path(str(next(file for file in listed if file.name == _LICENSE).locate()))


def _size(path: Path) -> int:
    if path.is_file():
        return path.stat().st_size
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
