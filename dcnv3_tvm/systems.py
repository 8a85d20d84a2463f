"""Operating systems that models are compiled for: their targets, linkers and runtime libraries."""

from __future__ import annotations

import dataclasses
import functools
import re
import sys
from collections.abc import Mapping
from typing import Final

from dcnv3_tvm import machine

_NAMES: Final = {"linux": "linux", "darwin": "macos", "win32": "windows"}
"""Names of operating systems by ``sys.platform``."""

_LEVEL: Final = re.compile("v[234]")
"""x86-64's levels, which LLVM calls ``x86-64-v3`` and so on."""


@dataclasses.dataclass(frozen=True)
class System:
    """An operating system on a processor architecture.

    Parameters
    ----------
    name : str
        For example ``"linux-aarch64"``.
    triple : str
        LLVM's target triple.
    zig : str
        Zig's target; on Linux with the oldest glibc that TVM's runtime library runs on.
    runtime_library : str
        File name of TVM's runtime library.
    platform : str
        Platform tag of the wheels that pip installs there.
    cpu : str
        Processor that is compiled for by default, as `processor` takes it.
    """

    name: str
    triple: str
    zig: str
    runtime_library: str
    platform: str
    cpu: str

    @property
    def operating_system(self) -> str:
        """``"linux"``, ``"macos"`` or ``"windows"``."""
        return self.name.partition("-")[0]

    def processor(self, name: str = "") -> str:
        """Return LLVM's name of a processor: an x86-64 level such as ``"v3"``, or LLVM's own."""
        name = name or self.cpu
        is_level = self.name.endswith("x86_64") and _LEVEL.fullmatch(name)
        return f"x86-64-{name}" if is_level else name

    def slug(self, mcpu: str) -> str:
        """Return a name for files, such as ``"linux-aarch64-neoverse-n1"``."""
        return self.name if mcpu == "generic" else f"{self.name}-{mcpu.removeprefix('x86-64-')}"

    def runs(self, triple: str) -> bool:
        """Return whether code for a triple of LLVM is for this system."""
        return _name_of(triple) == self.name


SYSTEMS: Final[Mapping[str, System]] = {
    system.name: system
    for system in (
        System(
            "linux-x86_64",
            "x86_64-unknown-linux-gnu",
            "x86_64-linux-gnu.2.28",
            "libtvm_runtime.so",
            "manylinux_2_28_x86_64",
            "v3",
        ),
        System(
            "linux-aarch64",
            "aarch64-unknown-linux-gnu",
            "aarch64-linux-gnu.2.28",
            "libtvm_runtime.so",
            "manylinux_2_28_aarch64",
            "generic",
        ),
        System(
            "macos-arm64",
            # Not "arm64", which TVM does not take for 64-bit Arm.
            "aarch64-apple-macosx11.0.0",
            "aarch64-macos.11.0",
            "libtvm_runtime.dylib",
            "macosx_11_0_arm64",
            "apple-m1",
        ),
        System(
            "windows-x86_64",
            "x86_64-pc-windows-gnu",
            "x86_64-windows-gnu",
            "tvm_runtime.dll",
            "win_amd64",
            "v3",
        ),
    )
}
"""The systems that can be compiled for from any of them, by name."""


def system_of(triple: str) -> System | None:
    """Return the system of a target triple of LLVM; None if it is not one of `SYSTEMS`."""
    return SYSTEMS.get(_name_of(triple))


@functools.cache
def this_system() -> System:
    """Return the system of this machine, also if it is not one of `SYSTEMS`."""
    system = _NAMES.get(sys.platform, sys.platform)
    name = _join(system, machine.architecture())
    return SYSTEMS.get(name) or System(name, "", "", "libtvm_runtime.so", "", "")


def _name_of(triple: str) -> str:
    architecture, _, rest = triple.partition("-")
    found = re.search("linux|darwin|macos|windows", rest)
    system = "unknown" if found is None else _NAMES.get(found[0], found[0])
    return _join(system, architecture)


def _join(system: str, architecture: str) -> str:
    name = {"arm64": "aarch64", "amd64": "x86_64"}.get(architecture, architecture)
    # Apple's own name.
    return f"{system}-{'arm64' if (system, name) == ('macos', 'aarch64') else name}"
