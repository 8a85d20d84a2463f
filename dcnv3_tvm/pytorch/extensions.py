"""Stand-in for the published CUDA extension ``DCNv3``, in this process or in an environment.

The published code and its forks import a compiled module ``DCNv3`` and read the version of its
distribution. After `install`, both are found, and that code runs and trains on the CPU and on GPUs
with nothing built:

>>> from dcnv3_tvm.pytorch import extensions
>>> extensions.install().state
'stand-in'
>>> import importlib.metadata
>>> importlib.metadata.version("DCNv3")
'1.1'
>>> extensions.remove().state
'absent'

`install` lasts as long as the process; ``dcnv3-tvm extensions install`` writes the same into the
environment, for scripts that do not call it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import importlib.metadata
import importlib.util
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any, Final

from dcnv3_tvm.errors import DCNv3Error
from dcnv3_tvm.files import temporary_folder
from dcnv3_tvm.pytorch.extension_package import (
    MODULE,
    delete_package,
    is_stand_in,
    write_package,
)

ABSENT: Final = "absent"
STAND_IN: Final = "stand-in"
EXTENSION: Final = "extension"

_FOLDERS: Final[list[tempfile.TemporaryDirectory[str]]] = []
"""The folder that `install` has added to ``sys.path``."""


@dataclasses.dataclass(frozen=True)
class ExtensionStatus:
    """What ``import DCNv3`` gives.

    Parameters
    ----------
    state : str
        "absent", "stand-in" (this library's) or "extension" (any other module or distribution of
        this name).
    location : str or None
        Where it is.
    version : str or None
        Version of the distribution.
    """

    state: str
    location: str | None = None
    version: str | None = None


def status() -> ExtensionStatus:
    """Find what ``import DCNv3`` and a query of its version give now."""
    importlib.invalidate_caches()
    distributions = list(importlib.metadata.distributions(name=MODULE))
    others = [each for each in distributions if not is_stand_in(each)]
    own = {_folder(each): each for each in distributions if is_stand_in(each)}
    location = _module_location()
    if others or (location is not None and location.parent.parent not in own):
        place = location or _folder(others[0])
        return ExtensionStatus(EXTENSION, str(place), others[0].version if others else None)
    if location is None:
        return ExtensionStatus(ABSENT)
    folder = location.parent.parent
    return ExtensionStatus(STAND_IN, str(folder), own[folder].version)


def install() -> ExtensionStatus:
    """Make ``import DCNv3`` give this library's functions, in this process.

    ``importlib.metadata`` and ``pkg_resources`` find the distribution, version 1.1. A second call,
    and one where the environment has the stand-in, change nothing. Processes that are forked or
    spawned by ``multiprocessing`` have it too.

    Returns
    -------
    ExtensionStatus
        The new status.

    Raises
    ------
    DCNv3Error
        If there is another module or distribution of this name, which is not replaced.
    """
    found = _raise_if_extension(status())
    if found.state == ABSENT:
        folder = temporary_folder("extensions-")
        write_package(Path(folder.name))
        _FOLDERS.append(folder)
        sys.path.append(folder.name)
        if (working_set := _working_set()) is not None:
            working_set.add_entry(folder.name)
    return status()


def remove() -> ExtensionStatus:
    """Undo `install`; return the new status.

    Code that has imported the module keeps it. A stand-in of the environment stays.
    """
    while _FOLDERS:
        folder = _FOLDERS.pop()
        location = _module_location()
        if location is not None and location.is_relative_to(Path(folder.name).resolve()):
            sys.modules.pop(MODULE, None)
        with contextlib.suppress(ValueError):
            sys.path.remove(folder.name)
        if (working_set := _working_set()) is not None and folder.name in working_set.entries:
            working_set.entries.remove(folder.name)
            for key in working_set.entry_keys.pop(folder.name):
                del working_set.by_key[key]
        folder.cleanup()
    return status()


def environment_folder() -> Path:
    """Return the folder into which packages of this environment are installed."""
    return Path(sysconfig.get_path("purelib"))


def install_in_environment() -> ExtensionStatus:
    """Write the stand-in into this Python environment, as a package that pip knows.

    Raises
    ------
    DCNv3Error
        If there is another module or distribution of this name, which is not replaced, or the
        folder of packages cannot be written.
    """
    _raise_if_extension(status())
    write_package(environment_folder())
    return status()


def remove_from_environment() -> ExtensionStatus:
    """Delete the stand-in from this Python environment; an extension stays.

    Raises
    ------
    DCNv3Error
        If the folder of packages cannot be written.
    """
    delete_package(environment_folder())
    return status()


def _folder(distribution: importlib.metadata.Distribution) -> Path:
    """Return the folder of a distribution."""
    return Path(str(distribution.locate_file(""))).resolve()


def _module_location() -> Path | None:
    """Return the file that ``import DCNv3`` loads or has loaded; None if there is no module."""
    loaded = sys.modules.get(MODULE)
    if loaded is not None:
        file = getattr(loaded, "__file__", None)
        return Path(f"sys.modules[{MODULE!r}]") if file is None else Path(file).resolve()
    spec = importlib.util.find_spec(MODULE)
    # A folder of this name without modules is a namespace package, whose origin is None.
    return None if spec is None or spec.origin is None else Path(spec.origin).resolve()


def _raise_if_extension(found: ExtensionStatus) -> ExtensionStatus:
    if found.state == EXTENSION:
        raise DCNv3Error(
            f"there is a {MODULE} that is not this library's, and is not replaced",
            got=f"{found.location}, version {found.version or 'unknown'}",
            hint=f"To use this library's, run `pip uninstall {MODULE}` or delete it.",
        )
    return found


def _working_set() -> Any:
    """Return the distributions that pkg_resources knows; None where it is not imported."""
    return getattr(sys.modules.get("pkg_resources"), "working_set", None)
