"""Load an artifact, after checking that it is intact and runs on this machine."""

from __future__ import annotations

import dataclasses
import functools
import os
import stat
from pathlib import Path
from typing import Any, Final

from dcnv3_tvm import checks, gpu
from dcnv3_tvm.digests import digest_of, digest_of_file
from dcnv3_tvm.errors import ArtifactError, DCNv3Error, InvalidArgumentError, TargetError
from dcnv3_tvm.machine import enable_amx, missing_features
from dcnv3_tvm.runtime import cuda, library, weights
from dcnv3_tvm.runtime.metadata import (
    CUDA_LIBRARY,
    LIBRARY,
    METADATA,
    RUNTIME_LIBRARY,
    WEIGHTS,
    ArtifactMetadata,
    TargetInfo,
)
from dcnv3_tvm.runtime.model import CompiledModel
from dcnv3_tvm.systems import this_system

_ATTEMPTS: Final = 10


def load(
    path: str | os.PathLike[str],
    *,
    verify_digests: bool = True,
    device: str | None = None,
    threads: int | None = None,
    workers: int = 1,
    warm_up: bool = False,
    owner: object | None = None,
) -> CompiledModel:
    """Load a compiled model. Neither PyTorch nor TVM's compiler is needed or imported.

    Weights are memory-mapped: the folder may be replaced or removed while the model is in use, but
    its weights must not be edited in place.

    Parameters
    ----------
    path : str or path
        The artifact's folder.
    verify_digests : bool
        Check the digest of every file, which reads all of them: on two cores 0.5 s per GB of
        weights. Otherwise nothing is read but the code; weights are read from disk on first use.
    device : str, optional
        ``"cpu"``, ``"cuda"`` (the first GPU) or ``"cuda:1"``; by default the device the artifact
        was compiled for. Weights are copied to a GPU on loading.
    threads : int, optional
        CPU threads of a call; by default ``TVM_NUM_THREADS`` or ``OMP_NUM_THREADS`` of the
        environment, else the number of physical cores this process may use, divided by `workers`.
    workers : int
        Number of calls from different threads that run side by side. They share the weights; each
        needs memory for intermediate results. On a GPU it is 1.
    warm_up : bool
        Call the model once (`CompiledModel.warm_up`), so that the first call is as fast as later
        ones. On a GPU this captures its graphs.
    owner : object, optional
        Kept alive as long as the model, for example a temporary folder that holds `path`.

    Returns
    -------
    CompiledModel

    Raises
    ------
    InvalidArgumentError
        If an argument has another type or is out of range.
    ArtifactError
        If the artifact is missing, modified, truncated, or of another schema or TVM version.
    TargetError
        If it was compiled for another machine or device, or the GPU does not exist.
    DeviceError
        If the GPU has too little free memory for the weights.
    MissingDependencyError
        If the artifact is for a GPU and CUDA's runtime library is not installed.

    Examples
    --------
    >>> model = load("internimage_t")  # doctest: +SKIP
    >>> logits = model(model.preprocess("photo.jpg"))  # doctest: +SKIP
    """
    if threads is not None:
        threads = checks.integer("threads", threads, low=1, high=library.MAX_THREADS)
    workers = checks.integer("workers", workers, low=1, high=library.MAX_THREADS)
    verify_digests = checks.boolean("verify_digests", verify_digests)
    warm_up = checks.boolean("warm_up", warm_up)
    folder = checks.path("path", path)
    content = _read_unchanged(folder, verify_digests=verify_digests, device=device)
    if content.gpu is not None and workers > 1:
        raise InvalidArgumentError(
            "a model on a GPU has one worker", got=f"workers={workers}", allowed=1
        )
    device_gpu = None if content.gpu is None else cuda.Gpu.of(content.gpu)
    model = CompiledModel(
        library.open_executables(content.code, count=workers)
        if device_gpu is None
        else library.Executables([device_gpu.open_executable(content.code)]),
        content.weights if device_gpu is None else device_gpu.upload_all(content.weights),
        content.metadata,
        folder=folder.absolute(),
        threads=max(1, library.default_threads() // workers) if threads is None else threads,
        reload=functools.partial(
            load,
            verify_digests=verify_digests,
            device=device,
            threads=threads,
            workers=workers,
            warm_up=warm_up,
        ),
        gpu=device_gpu,
        owner=owner,
    )
    if warm_up:
        model.warm_up()
    return model


@dataclasses.dataclass(frozen=True)
class _Content:
    """What is read of an artifact; `gpu` is the index of the GPU, or None."""

    metadata: ArtifactMetadata
    gpu: int | None
    code: bytes
    weights: dict[str, Any]


def _read_unchanged(folder: Path, *, verify_digests: bool, device: str | None) -> _Content:
    """Read an artifact, again if it is replaced meanwhile: files may be of the old and the new."""
    for _ in range(_ATTEMPTS):
        before = _identity(folder)
        try:
            content = _read(folder, verify_digests=verify_digests, device=device)
        except DCNv3Error:
            if _identity(folder) == before:
                raise
        else:
            if _identity(folder) == before:
                return content
    raise ArtifactError("the artifact is replaced again and again", got=folder)


def _identity(folder: Path) -> tuple[int, ...] | None:
    """Return what differs between a folder and another that takes its place; None without one."""
    try:
        status = folder.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino, status.st_mtime_ns


def _read(folder: Path, *, verify_digests: bool, device: str | None) -> _Content:
    try:
        metadata = read_metadata(folder, verify_digest=verify_digests)
        index = check_runs_here(metadata, device)
        code = (folder / LIBRARY).read_bytes()
        if verify_digests:
            _check_digest(LIBRARY, digest_of(memoryview(code)), metadata)
            for name in metadata.libraries:
                _check_digest(name, digest_of_file(folder / name), metadata)
        bundled = folder.resolve()
        library.load_runtime(
            version=metadata.versions.get("tvm", ""),
            bundled=bundled / RUNTIME_LIBRARY if RUNTIME_LIBRARY in metadata.libraries else None,
        )
        if index is not None:
            cuda.load_runtime(bundled / CUDA_LIBRARY)
        tensors, digest = weights.read(folder / WEIGHTS, digest=verify_digests)
        if verify_digests:
            _check_digest(WEIGHTS, digest, metadata)
    except OSError as error:
        raise _unreadable(folder, error) from error
    _check_weights(tensors, metadata)
    return _Content(metadata, index, code, tensors)


def read_metadata(path: str | os.PathLike[str], *, verify_digest: bool = True) -> ArtifactMetadata:
    """Read an artifact's metadata without loading its code.

    Parameters
    ----------
    path : str or path
        The artifact's folder.
    verify_digest : bool
        Check that the metadata was not modified.

    Returns
    -------
    ArtifactMetadata

    Raises
    ------
    ArtifactError
        If `path` is not an artifact, or its metadata is invalid or modified.
    InvalidArgumentError
        If `path` is not a path.
    """
    folder = checks.path("path", path)
    try:
        is_folder = stat.S_ISDIR(folder.stat().st_mode)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ArtifactError(
            "the artifact does not exist",
            got=folder,
            hint=f"Make it with: dcnv3-tvm compile internimage_t --checkpoint FILE -o {folder}",
        ) from error
    except OSError as error:
        raise _unreadable(folder, error) from error
    if not is_folder:
        raise ArtifactError(
            "an artifact is a folder, but this is a file",
            got=folder,
            hint="Pass the folder.",
        )
    try:
        text = (folder / METADATA).read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise ArtifactError(
            f"the folder is not an artifact: it has no {METADATA}",
            got=folder,
            hint="Pass the folder that `dcnv3-tvm compile` wrote.",
        ) from error
    except UnicodeDecodeError as error:
        raise ArtifactError(
            f"{METADATA} is not valid JSON", got=error, hint="Compile the model again."
        ) from error
    except OSError as error:
        raise _unreadable(folder, error) from error
    return ArtifactMetadata.loads(text, verify_digest=verify_digest)


def check_runs_here(metadata: ArtifactMetadata, device: str | None = None) -> int | None:
    """Check that an artifact runs on a device of this machine.

    Parameters
    ----------
    metadata : ArtifactMetadata
        Of the artifact.
    device : str, optional
        As in `load`.

    Returns
    -------
    int or None
        Index of the GPU it will run on; None for the CPU.

    Raises
    ------
    TargetError
        As in `check_target`, and if it uses AMX and the system denies that.
    """
    index = check_target(metadata.target, device)
    if metadata.uses_amx:
        check_amx()
    return index


def check_target(target: TargetInfo, device: str | None = None) -> int | None:
    """Check that code for a target runs on a device of this machine.

    Parameters
    ----------
    target : TargetInfo
        Target of the code.
    device : str, optional
        As in `load`.

    Returns
    -------
    int or None
        Index of the GPU it will run on; None for the CPU.

    Raises
    ------
    TargetError
        If the code is for another kind of device, another system, or needs CPU features that this
        machine lacks.
    """
    index = _device_index(target, device)
    hint = "Compile the model again on this machine, or with a --target that fits it."
    if target.is_for_another_system:
        name = target.triple if target.system is None else target.system.name
        here = this_system().name
        raise TargetError(
            "the artifact is for another system",
            got=name,
            allowed=f"{here} (this machine)",
            hint=f"Load it on {name}, or compile the model for this system (--target {here}).",
        )
    missing = missing_features(target.features)
    if missing:
        raise TargetError(
            f"the artifact is for another CPU ({target.mcpu or target.slug}): this one lacks "
            f"{', '.join(missing)}",
            hint=hint,
        )
    if index is not None:
        if not gpu.devices():
            raise TargetError(
                "the artifact is for NVIDIA GPUs, and this machine has none, or no driver",
                got=target.slug or target.arch,
                hint="Check that nvidia-smi lists the GPU, or compile the model again for the CPU "
                "(--target auto).",
            )
        present = gpu.device(index)
        if not gpu.runs_on(target.arch, present.arch):
            raise TargetError(
                "the artifact is for another GPU architecture",
                got=f"{target.arch}, but cuda:{index} ({present.name}) is {present.arch}",
                allowed="the same, or a later one of its generation with as much shared memory",
                hint=f"Compile the model again with --target {gpu.target_name(present.arch)}.",
            )
    return index


def check_amx() -> None:
    """Ask for the permission to use AMX.

    Raises
    ------
    TargetError
        If the system denies it.
    """
    if not enable_amx():
        raise TargetError(
            "the system denies the use of AMX, which bfloat16 matmuls need on this processor",
            got="no permission for the tile registers (arch_prctl ARCH_REQ_XCOMP_PERM)",
            hint="It takes Linux 5.16, and a sandbox that permits arch_prctl. Otherwise compile "
            'with dtype="float32".',
        )


def _device_index(target: TargetInfo, device: str | None) -> int | None:
    kinds = {"llvm": "cpu", "cuda": "cuda"}
    if target.kind not in kinds:
        raise TargetError(
            "the artifact is neither for a CPU nor for an NVIDIA GPU",
            got=f"target {target.kind}",
            allowed=", ".join(kinds),
        )
    kind = kinds[target.kind]
    wanted, colon, number = (kind if device is None else str(device)).partition(":")
    valid = wanted == "cuda" and number.isdecimal() and len(number) < 4 if colon else True
    if wanted not in kinds.values() or not valid:
        raise TargetError(
            "the device name is invalid", got=repr(device), allowed="'cpu', 'cuda', 'cuda:1'"
        )
    if wanted != kind:
        other = "auto" if wanted == "cpu" else wanted
        raise TargetError(
            f"the artifact runs on {kind}, not on {wanted}",
            got=f"device={device!r} for an artifact compiled for {target.slug or target.kind}",
            allowed=repr(kind),
            hint=f"Compile the model again with --target {other}.",
        )
    return int(number or 0) if wanted == "cuda" else None


def _check_digest(name: str, digest: str, metadata: ArtifactMetadata) -> None:
    if digest != metadata.digests.get(name):
        raise ArtifactError(
            f"{name} was modified after it was written",
            got=f"digest {digest[:12]}…",
            allowed=f"{str(metadata.digests.get(name))[:12]}…",
            hint="Copy the artifact again, or compile the model again.",
        )


def _check_weights(tensors: dict[str, Any], metadata: ArtifactMetadata) -> None:
    needed = {name for entry in metadata.entries.values() for name in entry.weights}
    missing = sorted(needed - tensors.keys())
    if missing:
        raise ArtifactError(
            f"{WEIGHTS} lacks {len(missing)} weights of the model",
            got=f"missing {', '.join(missing[:3])}",
            hint="Compile the model again.",
        )


def _unreadable(folder: Path, error: OSError) -> ArtifactError:
    name = Path(error.filename).name if error.filename else folder.name
    if isinstance(error, FileNotFoundError):
        return ArtifactError(
            f"the artifact is incomplete: it has no {name}", got=folder, hint="Copy it again."
        )
    return ArtifactError(
        f"{name} cannot be read", got=error.strerror, hint="Check its permissions."
    )
