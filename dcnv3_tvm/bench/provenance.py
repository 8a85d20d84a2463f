"""Where numbers come from: processor, threads, versions, date, commit."""

from __future__ import annotations

import dataclasses
import datetime
import os
import platform
import subprocess
from pathlib import Path
from typing import Any, Final

import dcnv3_tvm
from dcnv3_tvm import machine
from dcnv3_tvm.bench.contestants import version

_PACKAGES: Final = {
    "tvm": "apache-tvm",
    "numpy": "numpy",
    "torch": "torch",
    "onnxruntime": "onnxruntime",
    "openvino": "openvino",
}


@dataclasses.dataclass(frozen=True)
class Provenance:
    """Circumstances of a measurement.

    Parameters
    ----------
    cpu : str
        Name of the processor.
    cores, threads : int
        Physical cores this process may use; threads that each contestant computes with.
    load : float
        Load average of the minute before: others who compute at the same time disturb.
    date : str
        UTC, ISO 8601.
    commit : str or None
        Of the checkout the library is in, with ``+`` where files differ from it; None where it
        is installed.
    versions : dict of str to str
        Of what is installed.
    gpu, driver : str or None
        Name of the GPU that computed, and the version of its driver; None where none did.
    """

    cpu: str
    cores: int
    threads: int
    load: float
    date: str
    commit: str | None
    versions: dict[str, str]
    gpu: str | None = None
    driver: str | None = None

    @classmethod
    def here(cls, threads: int, *, gpu: str | None = None, driver: str | None = None) -> Provenance:
        """Describe this process."""
        versions = {"dcnv3_tvm": dcnv3_tvm.__version__, "python": platform.python_version()}
        found = {name: version(package) for name, package in _PACKAGES.items()}
        return cls(
            cpu=_cpu(),
            cores=machine.physical_cores(),
            threads=threads,
            load=round(os.getloadavg()[0], 2),
            date=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            commit=_commit(),
            versions=versions | {name: text for name, text in found.items() if text is not None},
            gpu=gpu,
            driver=driver,
        )

    @property
    def line(self) -> str:
        """All of it in one line."""
        versions = ", ".join(f"{name} {text}" for name, text in self.versions.items())
        commit = f", commit {self.commit}" if self.commit else ""
        machine_text = f"{self.cpu}, {self.cores} cores, {self.threads} threads, load {self.load}"
        if self.gpu is not None:
            machine_text = f"{self.gpu} (driver {self.driver or 'unknown'}); {machine_text}"
        return f"{machine_text}; {versions}; {self.date}{commit}"

    def columns(self) -> dict[str, Any]:
        """Return the columns that lines of CSV end with."""
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
        """Return plain values."""
        return dataclasses.asdict(self)


def _cpu() -> str:
    """Name the processor, with LLVM's name of it: virtual machines hide the model."""
    from dcnv3_tvm import targets

    return f"{machine.cpu_name()} ({targets.host_cpu()})"


def _commit() -> str | None:
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
