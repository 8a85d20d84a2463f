"""Write a compiled model to an artifact folder, atomically."""

from __future__ import annotations

import dataclasses
import datetime
import importlib.metadata
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dcnv3_tvm import files
from dcnv3_tvm.compiler import artifact_readme
from dcnv3_tvm.compiler.runtime_wheel import runtime_libraries
from dcnv3_tvm.digests import digest_of_file
from dcnv3_tvm.errors import ArtifactError, os_reason
from dcnv3_tvm.runtime import weights as weights_file
from dcnv3_tvm.runtime.loading import read_metadata
from dcnv3_tvm.runtime.metadata import (
    CARD,
    LIBRARY,
    METADATA,
    WEIGHTS,
    ArtifactMetadata,
)
from dcnv3_tvm.runtime.model import check_replaceable
from dcnv3_tvm.systems import this_system


def write(
    destination: str | os.PathLike[str],
    *,
    library: Path | bytes,
    weights: Mapping[str, weights_file.Weight],
    metadata: ArtifactMetadata,
    runtime: Mapping[str, bytes] | None = None,
) -> None:
    """Write an artifact.

    Parameters
    ----------
    destination : str or path
        The folder. An artifact in it is replaced, and unchanged if writing fails.
    library : Path or bytes
        The compiled shared library, as a file or its content.
    weights : mapping of str to Weight
        By the names that the entries use: arrays of any memory layout, or lazy ones.
    metadata : ArtifactMetadata
        Digests are filled in, and versions and date if empty.
    runtime : mapping of str to bytes, optional
        From `runtime_libraries`; by default the installed ones.

    Raises
    ------
    ArtifactError
        If `destination` holds something other than an artifact or cannot be written; if a weight of
        an entry is missing or has an unsupported dtype.
    """
    destination = Path(destination)
    check_replaceable(destination)
    _check_weights(weights, metadata)
    if runtime is None:
        runtime = runtime_libraries(this_system(), on_gpu=metadata.target.kind == "cuda")
    try:
        with files.atomic_folder(destination) as folder:
            if isinstance(library, bytes):
                (folder / LIBRARY).write_bytes(library)
            else:
                shutil.copyfile(library, folder / LIBRARY)
            for name, content in runtime.items():
                (folder / name).write_bytes(content)
            weights_file.write(folder / WEIGHTS, weights)
            complete = dataclasses.replace(
                metadata,
                digests={
                    name: digest_of_file(folder / name) for name in (LIBRARY, WEIGHTS, *runtime)
                },
                versions=metadata.versions or installed_versions(),
                created=metadata.created or _now(),
            )
            (folder / CARD).write_text(artifact_readme.render(complete), encoding="utf-8")
            (folder / METADATA).write_text(complete.dumps(), encoding="utf-8")
    except OSError as error:
        raise ArtifactError(
            "the artifact cannot be written",
            got=os_reason(error, destination),
            hint=f"{destination} is unchanged.",
        ) from error


def record_verification(
    folder: Path, verified: ArtifactMetadata, verification: dict[str, Any]
) -> None:
    """Record in an artifact how its outputs compare with the reference implementation.

    Parameters
    ----------
    folder : Path
        The artifact.
    verified : ArtifactMetadata
        Metadata of the model that was compared.
    verification : dict
        JSON values: the reference, the inputs, and the errors of each output.

    Raises
    ------
    ArtifactError
        If the artifact was replaced in the meantime, or cannot be read or written; it is then
        unchanged.
    """
    try:
        with files.kept_folder(folder):
            metadata = dataclasses.replace(read_metadata(folder), verification=verification)
            if metadata.digests != verified.digests:
                raise ArtifactError(
                    "the artifact was replaced while it was verified",
                    got=folder,
                    hint="Verify it again.",
                )
            with files.atomic_file(folder / METADATA) as path:
                path.write_text(metadata.dumps(), encoding="utf-8")
    except OSError as error:
        raise ArtifactError(
            "the verification cannot be written to the artifact",
            got=os_reason(error, folder),
            hint="The artifact is unchanged.",
        ) from error


def installed_versions() -> dict[str, str]:
    """Return the installed versions of the packages that an artifact records."""
    packages = {"dcnv3_tvm": "dcnv3-tvm", "tvm": "apache-tvm", "tvm_ffi": "apache-tvm-ffi"}
    return {name: importlib.metadata.version(package) for name, package in packages.items()}


def _now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def _check_weights(weights: Mapping[str, weights_file.Weight], metadata: ArtifactMetadata) -> None:
    needed = {name for entry in metadata.entries.values() for name in entry.weights}
    missing = sorted(needed - weights.keys())
    if missing:
        raise ArtifactError(f"{len(missing)} weights of the model are missing", got=missing[0])
