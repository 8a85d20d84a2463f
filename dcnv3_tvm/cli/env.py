"""``dcnv3-tvm env``: describe the machine and the installation."""

from __future__ import annotations

import argparse
import dataclasses
import platform
from typing import Any, Final

from dcnv3_tvm.cli.result import Result, table
from dcnv3_tvm.errors import INSTALL_FFI, MissingDependencyError
from dcnv3_tvm.provenance import installed_version

HELP: Final = "show versions, CPU, GPUs, threads and environment variables"
EXAMPLE: Final = "dcnv3-tvm env"

_PACKAGES: Final = {
    "dcnv3_tvm": "dcnv3-tvm",
    "tvm": "apache-tvm",
    "tvm_ffi": "apache-tvm-ffi",
    "numpy": "numpy",
    "torch": "torch",
    "pillow": "pillow",
    "safetensors": "safetensors",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare no arguments."""
    del parser


def execute(arguments: argparse.Namespace) -> Result:
    """Describe the machine and the installation."""
    del arguments
    from dcnv3_tvm import gpu, machine
    from dcnv3_tvm.environment import VARIABLES
    from dcnv3_tvm.runtime.library import default_threads

    versions: dict[str, str | None] = {"python": platform.python_version()}
    versions |= {name: installed_version(package) for name, package in _PACKAGES.items()}
    features = machine.cpu_features()
    data: dict[str, Any] = {
        "versions": versions,
        "platform": platform.platform(),
        "cpu": machine.cpu_name(),
        "cpu_features": None if features is None else sorted(features),
        "amx": _amx(features),
        "physical_cores": machine.physical_cores(),
        "threads": default_threads(),
        "auto_target": _auto_target(),
        "linker": _linker(),
        "gpus": [dataclasses.asdict(device) for device in gpu.devices()],
        "cuda": _cuda(),
        "operator_cache": _operator_cache(),
        "variables": [
            {
                "name": variable.name,
                "value": variable.value,
                "read_by": variable.reader,
                "meaning": variable.meaning,
            }
            for variable in VARIABLES
        ],
        "warnings": version_warnings(versions),
    }
    facts = [(name, version or "not installed") for name, version in versions.items()]
    facts += [
        ("platform", data["platform"]),
        ("cpu", f"{data['cpu']}, {data['physical_cores']} cores"),
        ("cpu features", "unknown" if features is None else " ".join(sorted(features))),
        ("AMX", data["amx"]),
        ("threads", data["threads"]),
        ("target auto", data["auto_target"] or "unknown (TVM cannot be imported)"),
        ("linker", data["linker"] or "unknown (TVM cannot be imported)"),
        *[
            (f"cuda:{found.index}", f"{found.name}, {found.arch}, {found.total_bytes / 1e9:.0f} GB")
            for found in gpu.devices()
        ],
        *[(name, value or "not found") for name, value in data["cuda"].items()],
    ]
    cache = data["operator_cache"]
    facts.append(
        (
            "operator cache",
            f"{cache['folder']}, {cache['bytes'] / 1e6:.1f} of {cache['limit'] / 1e6:.0f} MB"
            if cache["folder"]
            else "off",
        )
    )
    variables = [
        (row["name"], "-" if row["value"] is None else row["value"], row["read_by"], row["meaning"])
        for row in data["variables"]
    ]
    sections = [
        table(["", ""], facts).strip("\n"),
        table(["variable", "value", "read by", "meaning"], variables),
        *(f"warning: {warning}" for warning in data["warnings"]),
    ]
    return Result(data, "\n\n".join(sections))


def _operator_cache() -> dict[str, Any]:
    """Return the folder of compiled operators, None without one, and its size and limit."""
    from dcnv3_tvm.compiler import kernel_cache

    folder = kernel_cache.cache_folder()
    return {
        "folder": None if folder is None else str(folder),
        "bytes": kernel_cache.used_bytes(),
        "limit": kernel_cache.LIMIT,
    }


def _amx(features: frozenset[str] | None) -> str:
    """Say whether this process may use AMX."""
    from dcnv3_tvm import machine

    if features is None or not features >= machine.AMX_FEATURES:
        return "none"
    return "available" if machine.enable_amx() else "denied by the system"


def _cuda() -> dict[str, str | None]:
    """Return what is installed for running and compiling GPU code."""
    from dcnv3_tvm import gpu
    from dcnv3_tvm.runtime import cuda_toolkit

    version = gpu.driver_version()
    tools = {
        "CUDA runtime": cuda_toolkit.find_cudart(),
        "nvcc": cuda_toolkit.find_nvcc(),
        "NVRTC": cuda_toolkit.find_nvrtc(),
    }
    return {
        "NVIDIA driver": None if version is None else "CUDA {}.{}".format(*version),
        **{name: None if path is None else str(path) for name, path in tools.items()},
    }


def version_warnings(versions: dict[str, str | None]) -> list[str]:
    """Return warnings about incompatible versions."""
    # See tvm_workarounds: ffi-json.
    tvm, ffi = versions.get("tvm"), versions.get("tvm_ffi")
    if tvm and ffi and tvm.startswith("0.27.") and _release(ffi) >= (0, 1, 15):
        return [
            f"TVM {tvm} with tvm-ffi {ffi} crashes when it reads or writes JSON, as tuning does. "
            f"{INSTALL_FFI}"
        ]
    return []


def _release(version: str) -> tuple[int, ...]:
    parts = version.split(".")[:3]
    return tuple(int(part) for part in parts if part.isdecimal())


def _auto_target() -> str | None:
    try:
        from dcnv3_tvm import targets

        return targets.target_slug(targets.resolve_target("auto"))
    except ImportError:
        return None


def _linker() -> str | None:
    """Return the program that links compiled models for this system, or what to do without one."""
    try:
        from dcnv3_tvm.compiler.linker import find_linker
        from dcnv3_tvm.systems import this_system

        command = find_linker(this_system()).command
    except MissingDependencyError as error:
        return str(error)
    except ImportError:
        return None
    return "ziglang" if "ziglang" in command else command[0]
