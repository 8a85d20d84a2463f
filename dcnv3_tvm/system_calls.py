"""What macOS and Windows tell about the processor; Linux has files for it."""

from __future__ import annotations

import ctypes
from typing import Any, Final

_MACOS_FEATURES: Final = {
    "bf16": "FEAT_BF16",
    "dotprod": "FEAT_DotProd",
    "fullfp16": "FEAT_FP16",
    "i8mm": "FEAT_I8MM",
    "lse": "FEAT_LSE",
    "rdm": "FEAT_RDM",
}
"""LLVM's names of CPU features, with those of ``sysctl``, which macOS 12 introduced."""

_WINDOWS_FEATURES: Final = {
    "sse3": 13,
    "ssse3": 36,
    "sse4.1": 37,
    "sse4.2": 38,
    "avx": 39,
    "avx2": 40,
    "avx512f": 41,
}
"""LLVM's names of CPU features, with the numbers of ``IsProcessorFeaturePresent``."""

_CORE_RELATIONSHIP: Final = 0


class _Processor(ctypes.Structure):
    """``SYSTEM_LOGICAL_PROCESSOR_INFORMATION``."""

    _fields_ = (
        ("mask", ctypes.c_size_t),
        ("relationship", ctypes.c_int),
        ("details", ctypes.c_uint64 * 2),
    )


def macos_features() -> dict[str, bool]:
    """Return whether the processor has each feature, by LLVM's name, that macOS knows."""
    found = {name: _sysctl(f"hw.optional.arm.{key}") for name, key in _MACOS_FEATURES.items()}
    return {name: bool(value) for name, value in found.items() if value is not None}


def macos_cores() -> int | None:
    """Return the number of fast cores; None if unknown.

    A loop that is divided evenly waits for the slowest core, so the others are not counted.
    """
    return _sysctl("hw.perflevel0.physicalcpu") or _sysctl("hw.physicalcpu")


def windows_features() -> dict[str, bool] | None:
    """Return whether the processor has each feature, by LLVM's name; None if unknown."""
    present = {name: bool(_ask_windows(number)) for name, number in _WINDOWS_FEATURES.items()}
    # An older Windows answers no for numbers that it does not know.
    return present if present["sse4.2"] else None


def windows_cores() -> int | None:
    """Return the number of physical cores; None if unknown."""
    kernel = _kernel32()
    length = ctypes.c_uint32(0)
    kernel.GetLogicalProcessorInformation(None, ctypes.byref(length))
    records = (_Processor * (length.value // ctypes.sizeof(_Processor)))()
    if not kernel.GetLogicalProcessorInformation(records, ctypes.byref(length)):
        return None
    return sum(record.relationship == _CORE_RELATIONSHIP for record in records) or None


def _sysctl(name: str) -> int | None:
    value, size = ctypes.c_int64(0), ctypes.c_size_t(8)
    failed = ctypes.CDLL(None).sysctlbyname(
        name.encode(), ctypes.byref(value), ctypes.byref(size), None, ctypes.c_size_t(0)
    )
    return None if failed else value.value


def _ask_windows(number: int) -> int:
    return int(_kernel32().IsProcessorFeaturePresent(number))


def _kernel32() -> Any:
    return ctypes.WinDLL("kernel32")  # type: ignore[attr-defined]  # It is there on Windows only.
