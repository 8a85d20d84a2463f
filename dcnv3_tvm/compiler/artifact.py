"""Write a compiled model to a folder, whole or not at all."""

from __future__ import annotations

import dataclasses
import datetime
import importlib.metadata
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dcnv3_tvm import files
from dcnv3_tvm.compiler import artifact_readme
from dcnv3_tvm.errors import ArtifactError, MissingDependencyError
from dcnv3_tvm.runtime import weights as weights_file
from dcnv3_tvm.runtime.library import installed_runtime
from dcnv3_tvm.runtime.loading import read_metadata
from dcnv3_tvm.runtime.metadata import (
    CARD,
    LIBRARY,
    METADATA,
    WEIGHTS,
    ArtifactMetadata,
)
from dcnv3_tvm.runtime.model import check_replaceable


def write(
    destination: str | os.PathLike[str],
    *,
    library: Path | bytes,
    weights: Mapping[str, np.ndarray],
    metadata: ArtifactMetadata,
) -> None:
    """Write an artifact.

    Parameters
    ----------
    destination : str or path
        The folder. An artifact there is replaced, and stays whole when anything fails.
    library : Path or bytes
        What ``Executable.export_library`` wrote.
    weights : mapping of str to numpy.ndarray
        By the names the entries have; any layout in memory.
    metadata : ArtifactMetadata
        Digests are filled in; so are versions and the date where they are empty.

    Raises
    ------
    ArtifactError
        If `destination` holds something that is no artifact, or cannot be written; if a weight an
        entry needs is missing, or one has a type that cannot be written.
    """
    destination = Path(destination)
    check_replaceable(destination)
    _check_weights(weights, metadata)
    runtime = installed_runtime()
    if runtime is None:
        raise MissingDependencyError(
            "apache-tvm, whose runtime library goes into the artifact, is not installed",
            hint="Run: pip install apache-tvm==0.27.0.post1",
        )
    try:
        with files.atomic_folder(destination) as folder:
            if isinstance(library, bytes):
                (folder / LIBRARY).write_bytes(library)
            else:
                shutil.copyfile(library, folder / LIBRARY)
            for name in metadata.libraries:
                shutil.copyfile(runtime[0].with_name(name), folder / name)
            weights_file.write(folder / WEIGHTS, weights)
            complete = dataclasses.replace(
                metadata,
                digests={
                    name: files.sha256(folder / name)
                    for name in (LIBRARY, WEIGHTS, *metadata.libraries)
                },
                versions=metadata.versions or installed_versions(),
                created=metadata.created or _now(),
            )
            (folder / CARD).write_text(artifact_readme.render(complete), encoding="utf-8")
            (folder / METADATA).write_text(complete.dumps(), encoding="utf-8")
    except OSError as error:
        raise ArtifactError(
            "the artifact cannot be written",
            got=f"{error.strerror or error} ({error.filename or destination})",
            hint=f"What was at {destination} is unchanged.",
        ) from error


def record_verification(folder: Path, verification: dict[str, Any]) -> None:
    """Write into an artifact how far its outputs were from the truth.

    Parameters
    ----------
    folder : Path
        The artifact.
    verification : dict
        Plain values: what it was compared with, on what, and the errors of each output.

    Raises
    ------
    ArtifactError
        If the artifact cannot be read or written; it then stays as it was.
    """
    metadata = dataclasses.replace(read_metadata(folder), verification=verification)
    try:
        with files.atomic_file(folder / METADATA) as path:
            path.write_text(metadata.dumps(), encoding="utf-8")
    except OSError as error:
        raise ArtifactError(
            "the verification cannot be written into the artifact",
            got=f"{error.strerror} ({error.filename})",
            hint="The artifact is unchanged.",
        ) from error


def installed_versions() -> dict[str, str]:
    """Return the versions an artifact records, of the packages as they are installed."""
    packages = {"dcnv3_tvm": "dcnv3-tvm", "tvm": "apache-tvm", "tvm_ffi": "apache-tvm-ffi"}
    return {name: importlib.metadata.version(package) for name, package in packages.items()}


def _now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def _check_weights(weights: Mapping[str, np.ndarray], metadata: ArtifactMetadata) -> None:
    needed = {name for entry in metadata.entries.values() for name in entry.weights}
    missing = sorted(needed - weights.keys())
    if missing:
        raise ArtifactError(f"{len(missing)} weights of the model are missing", got=missing[0])
