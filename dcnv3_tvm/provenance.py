"""Provenance of a measurement: hardware, threads, versions, date, commit."""

from __future__ import annotations

import dataclasses
import datetime
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any, Final

import dcnv3_tvm
from dcnv3_tvm import machine

_PACKAGES: Final = {
    "tvm": "apache-tvm",
    "numpy": "numpy",
    "torch": "torch",
    "onnxruntime": "onnxruntime",
    "openvino": "openvino",
}


@dataclasses.dataclass(frozen=True)
class Provenance:
    """Hardware and software that a measurement was taken with.

    Parameters
    ----------
    cpu : str
        Name of the processor.
    cores, threads : int
        Physical cores available to this process; threads that each backend computes with.
    load : float or None
        Load average over the last minute: other processes disturb the measurement. None on Windows.
    date : str
        UTC, ISO 8601.
    commit : str or None
        Git commit of the checkout, with ``+`` if it has uncommitted changes; None for an
        installed package.
    versions : dict of str to str
        Installed versions by package.
    gpu, driver : str or None
        Name and driver version of the GPU that was measured; None for a CPU measurement.
    """

    cpu: str
    cores: int
    threads: int
    load: float | None
    date: str
    commit: str | None
    versions: dict[str, str]
    gpu: str | None = None
    driver: str | None = None

    @classmethod
    def here(cls, threads: int, *, gpu: str | None = None, driver: str | None = None) -> Provenance:
        """Describe this machine and this process."""
        versions = {"dcnv3_tvm": dcnv3_tvm.__version__, "python": platform.python_version()}
        found = {name: installed_version(package) for name, package in _PACKAGES.items()}
        return cls(
            cpu=cpu_description(),
            cores=machine.physical_cores(),
            threads=threads,
            load=round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
            date=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            commit=git_commit(),
            versions=versions | {name: text for name, text in found.items() if text is not None},
            gpu=gpu,
            driver=driver,
        )

    @property
    def line(self) -> str:
        """One-line description."""
        versions = ", ".join(f"{name} {text}" for name, text in self.versions.items())
        commit = f", commit {self.commit}" if self.commit else ""
        machine_text = f"{self.cpu}, {self.cores} cores, {self.threads} threads, load {self.load}"
        if self.gpu is not None:
            machine_text = f"{self.gpu} (driver {self.driver or 'unknown'}); {machine_text}"
        return f"{machine_text}; {versions}; {self.date}{commit}"

    def columns(self) -> dict[str, Any]:
        """Return the columns appended to every row of a CSV file."""
        device = {} if self.gpu is None else {"gpu": self.gpu, "driver": self.driver}
        return {
            "date": self.date,
            "commit": self.commit,
            "cpu": self.cpu,
            "cores": self.cores,
            "threads": self.threads,
            "versions": " ".join(f"{name}={text}" for name, text in self.versions.items()),
        } | device

    def to_json(self) -> dict[str, Any]:
        """Return values that JSON can represent."""
        return dataclasses.asdict(self)


def installed_version(package: str) -> str | None:
    """Return the installed version of a distribution; None if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def cpu_description() -> str:
    """Return the model name of the CPU and LLVM's name of it: virtual machines hide the model."""
    from dcnv3_tvm import targets

    try:
        return f"{machine.cpu_name()} ({targets.host_cpu()})"
    except ImportError:  # TVM, which has LLVM, is not needed to run compiled code.
        return machine.cpu_name()


def git_commit() -> str | None:
    """Return the commit of the checkout this package is imported from; None if it is installed."""
    folder = Path(dcnv3_tvm.__file__).parent
    if not (folder.parent / ".git").exists():
        return None
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty=+", "--exclude=*"],
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=30,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return described.stdout.strip()
