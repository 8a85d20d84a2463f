"""Properties of this machine: architecture, CPU features, cores."""

from __future__ import annotations

import ctypes
import functools
import os
import platform
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

from dcnv3_tvm import system_calls

_CPUINFO: Final = Path("/proc/cpuinfo")
_TOPOLOGY: Final = "/sys/devices/system/cpu/cpu{index}/topology/thread_siblings_list"

_ARCHITECTURES: Final = {"amd64": "x86_64", "x64": "x86_64", "arm64": "aarch64"}

_KERNEL_FLAGS: Final = {
    "avx": "avx",
    "avx2": "avx2",
    "avx512bf16": "avx512_bf16",
    "avx512bitalg": "avx512_bitalg",
    "avx512bw": "avx512bw",
    "avx512cd": "avx512cd",
    "avx512dq": "avx512dq",
    "avx512f": "avx512f",
    "avx512fp16": "avx512_fp16",
    "avx512ifma": "avx512ifma",
    "avx512vbmi": "avx512vbmi",
    "avx512vbmi2": "avx512_vbmi2",
    "avx512vl": "avx512vl",
    "avx512vnni": "avx512_vnni",
    "avx512vp2intersect": "avx512_vp2intersect",
    "avx512vpopcntdq": "avx512_vpopcntdq",
    "avxvnni": "avx_vnni",
    "amx-bf16": "amx_bf16",
    "amx-int8": "amx_int8",
    "amx-tile": "amx_tile",
    "bmi": "bmi1",
    "bmi2": "bmi2",
    "f16c": "f16c",
    "fma": "fma",
    "fma4": "fma4",
    "gfni": "gfni",
    "lzcnt": "abm",
    "movbe": "movbe",
    "popcnt": "popcnt",
    "sse3": "pni",
    "sse4.1": "sse4_1",
    "sse4.2": "sse4_2",
    "sse4a": "sse4a",
    "ssse3": "ssse3",
    "vaes": "vaes",
    "vpclmulqdq": "vpclmulqdq",
    "xop": "xop",
    "bf16": "bf16",
    "dotprod": "asimddp",
    "fullfp16": "asimdhp",
    "i8mm": "i8mm",
    "lse": "atomics",
    "neon": "asimd",
    "rdm": "asimdrdm",
    "sve": "sve",
    "sve2": "sve2",
}
"""LLVM's names of CPU features that compiled code may use, with the Linux kernel's names.

Features that a code generator does not use by itself (cache control, protection keys and so on) are
omitted, because virtual machines hide them.
"""


_IDENTITY: Final = (
    *("vendor_id", "cpu family", "model", "model name", "stepping", "flags"),
    *("CPU implementer", "CPU architecture", "CPU variant", "CPU part", "Features"),
)
"""Fields of /proc/cpuinfo on x86-64 and on Arm."""

AMX_FEATURES: Final = frozenset({"amx-bf16", "amx-tile"})
"""LLVM's names of the features of AMX that compiled code uses."""

_ARCH_PRCTL: Final = 158
_GET_XCOMP_SUPP: Final = 0x1021
_REQ_XCOMP_PERM: Final = 0x1023
_XTILEDATA: Final = 18


def architecture() -> str:
    """Return LLVM's name of the processor architecture, for example ``"x86_64"``."""
    name = platform.machine().lower()
    return _ARCHITECTURES.get(name, name)


def cpu_name() -> str:
    """Return the processor's marketing name, for example ``"AMD EPYC 9R14"``."""
    fields = _cpuinfo()
    return fields.get("model name") or platform.processor() or architecture()


def cpu_features() -> frozenset[str] | None:
    """Return LLVM's names of this processor's features; None if unknown."""
    reported = reported_features()
    if reported is None:
        return None
    return frozenset(name for name, is_present in reported.items() if is_present)


def reported_features() -> dict[str, bool] | None:
    """Return whether this processor has each feature that the system reports; None if unknown."""
    if platform.system() == "Darwin":
        return system_calls.macos_features()
    if platform.system() == "Windows":
        return system_calls.windows_features()
    fields = _cpuinfo()
    # An emulator of another architecture (QEMU) shows the file of the machine it runs on.
    flags = fields.get("Features" if architecture() == "aarch64" else "flags")
    if flags is None:
        return None
    present = set(flags.split())
    return {name: flag in present for name, flag in _KERNEL_FLAGS.items()}


def cpu_identity() -> tuple[str, ...] | None:
    """Return everything by which LLVM detects this processor and its features; None if unknown."""
    fields = _cpuinfo()
    return tuple(fields.get(name, "") for name in _IDENTITY) if fields else None


def missing_features(required: Iterable[str]) -> list[str]:
    """Return the required LLVM features that this processor does not have.

    Parameters
    ----------
    required : iterable of str
        LLVM names, with or without a leading ``+``. Features that do not affect compiled code, or
        of which the system tells nothing, are ignored.
    """
    reported = reported_features() or {}
    names = {name.removeprefix("+") for name in required}
    return sorted(name for name in names if not reported.get(name, True))


@functools.cache
def enable_amx() -> bool:
    """Ask Linux for the permission to use AMX's tile registers; return whether it is granted.

    It is the process's, and a forked child's. Without it, the first use ends the process.
    """
    return _arch_prctl(_REQ_XCOMP_PERM, _XTILEDATA)


@functools.cache
def offers_amx() -> bool:
    """Return whether Linux offers AMX's tile registers, without asking for the permission."""
    states = ctypes.c_uint64()
    return _arch_prctl(_GET_XCOMP_SUPP, ctypes.byref(states)) and bool(
        states.value >> _XTILEDATA & 1
    )


def _arch_prctl(code: int, argument: Any) -> bool:
    """Call Linux's ``arch_prctl``; return whether it succeeds."""
    if (platform.system(), architecture()) != ("Linux", "x86_64"):
        return False
    return bool(ctypes.CDLL(None).syscall(_ARCH_PRCTL, code, argument) == 0)


def usable_cores() -> set[int]:
    """Return the indices of the logical processors available to this thread."""
    try:
        return os.sched_getaffinity(0)
    except AttributeError:
        return set(range(os.cpu_count() or 1))


def physical_cores() -> int:
    """Return the number of physical cores available to this process; on macOS of the fast ones."""
    if platform.system() == "Darwin":
        return system_calls.macos_cores() or len(usable_cores())
    if platform.system() == "Windows":
        return system_calls.windows_cores() or len(usable_cores())
    return len({_siblings(index) for index in usable_cores()}) or 1


def _siblings(index: int) -> str:
    """Return the logical processors that share a core with this one."""
    try:
        return Path(_TOPOLOGY.format(index=index)).read_text().strip()
    except OSError:
        return str(index)


@functools.cache
def _cpuinfo() -> dict[str, str]:
    """Return the fields of the first processor in /proc/cpuinfo; empty without that file."""
    try:
        text = _CPUINFO.read_text()
    except OSError:
        return {}
    fields = {}
    for line in text.split("\n\n", 1)[0].splitlines():
        name, _, value = line.partition(":")
        fields[name.strip()] = value.strip()
    return fields
