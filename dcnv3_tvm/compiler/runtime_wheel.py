"""TVM's runtime library of another system, from the wheel that pip installs there."""

from __future__ import annotations

import contextlib
import re
import subprocess
import sys
import warnings
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from dcnv3_tvm import files
from dcnv3_tvm.compiler.kernel_cache import cache_folder
from dcnv3_tvm.errors import (
    INSTALL_TVM,
    DCNv3Warning,
    InvalidArgumentError,
    MissingDependencyError,
    first_line,
)
from dcnv3_tvm.runtime.library import installed_runtime
from dcnv3_tvm.runtime.metadata import CUDA_LIBRARY
from dcnv3_tvm.systems import System, this_system

_PACKAGE: Final = "apache-tvm"


def runtime_libraries(
    system: System, *, on_gpu: bool, wheel: Path | None = None
) -> dict[str, bytes]:
    """Return TVM's runtime libraries for an artifact, by file name.

    Parameters
    ----------
    system : System
        Runs the artifact.
    on_gpu : bool
        Whether the library for GPUs is needed, too.
    wheel : Path, optional
        Wheel of ``apache-tvm`` to take the library from. By default the installed library is taken,
        or for another system that of the same version, which pip downloads once.

    Returns
    -------
    dict of str to bytes
        Empty, with a `DCNv3Warning`, if pip cannot download the wheel.

    Raises
    ------
    InvalidArgumentError
        If `wheel` is not a wheel of the installed version for this system.
    MissingDependencyError
        If TVM is not installed.
    """
    installed = installed_runtime()
    if installed is None:
        raise MissingDependencyError(
            "apache-tvm, whose runtime library is copied into the artifact, is not installed",
            hint=INSTALL_TVM,
        )
    path, version = installed
    name = system.runtime_library
    names = (name, CUDA_LIBRARY) if on_gpu else (name,)
    if wheel is not None:
        return _read(wheel, system, version, names)
    if system == this_system():
        return {name: path.with_name(name).read_bytes() for name in names}
    cache = cache_folder()
    cached = None if cache is None else cache / f"tvm-{version}" / system.name / name
    if cached is not None and cached.is_file():
        return {name: cached.read_bytes()}
    try:
        content = _download(system, version, names)[name]
    except (OSError, RuntimeError, InvalidArgumentError) as error:
        warnings.warn(
            f"the artifact has no {name}, because pip cannot download the wheel of "
            f"{_PACKAGE}=={version} for {system.platform} ({first_line(error)}). On its machine, "
            f"install {_PACKAGE}=={version}, or compile again with runtime_wheel=WHEEL",
            DCNv3Warning,
            stacklevel=3,
        )
        return {}
    if cached is not None:
        with contextlib.suppress(OSError):  # A full or read-only disk.
            cached.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            with files.atomic_file(cached) as temporary:
                temporary.write_bytes(content)
    return {name: content}


def _download(system: System, version: str, names: Sequence[str]) -> dict[str, bytes]:
    """Return libraries of the wheel that pip downloads, and whose digest it checks."""
    with files.temporary_folder("wheel-") as folder:
        options = ("--quiet", "--no-deps", "--only-binary=:all:", "--retries=1")
        command = [sys.executable, "-m", "pip", "download", *options]
        command += ["--platform", system.platform, "--dest", folder, f"{_PACKAGE}=={version}"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise RuntimeError((done.stderr.strip() or "pip fails").splitlines()[-1])
        return _read(next(Path(folder).glob("*.whl")), system, version, names)


def _read(wheel: Path, system: System, version: str, names: Sequence[str]) -> dict[str, bytes]:
    """Return libraries in a wheel, after checking what the wheel is for."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            about = {
                Path(name).name: archive.read(name).decode()
                for name in archive.namelist()
                if re.fullmatch(r"apache_tvm-[^/]+\.dist-info/(WHEEL|METADATA)", name)
            }
            found = re.search(r"^Version: (.*)$", about["METADATA"], re.MULTILINE)
            tags = re.findall(r"^Tag: \S+-\S+-(\S+)$", about["WHEEL"], re.MULTILINE)
            wanted = re.sub(r"\d+_\d+", r"\\d+_\\d+", system.platform)
            if (
                found is None
                or found[1].strip() != version
                or not any(re.fullmatch(wanted, tag) for tag in tags)
            ):
                raise InvalidArgumentError(
                    "the wheel is for another system, or holds another version of TVM",
                    got=f"{wheel}: {'' if found is None else found[1]} for {', '.join(tags)}",
                    allowed=f"{_PACKAGE}=={version} for {system.platform}",
                    hint=f"Run: pip download --no-deps --only-binary=:all: "
                    f"--platform {system.platform} {_PACKAGE}=={version}",
                )
            return {name: archive.read(f"tvm/lib/{name}") for name in names}
    except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
        if isinstance(error, InvalidArgumentError):
            raise
        raise InvalidArgumentError(
            "the wheel of apache-tvm cannot be read", got=f"{wheel}: {first_line(error)}"
        ) from error
