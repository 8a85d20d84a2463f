"""A simulated kernel runner that crashes, hangs or fails on request."""

from __future__ import annotations

import dataclasses
import errno
import os
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from tvm import tirx

from dcnv3_tvm.compiler.kernel_listing import KernelArgument
from dcnv3_tvm.tuning.runner import KernelRunner

CRASH: Final = "crash"
HANG: Final = "hang"
FAIL: Final = "fail"
DISK_FULL: Final = "disk full"


def build_nothing(*_: Any) -> None:
    """Stand in for `build_candidate`: the simulated runner loads no library."""


@dataclasses.dataclass(frozen=True)
class SimulatedRunner(KernelRunner):
    """Runner whose measurements are numbered across processes and get faster one by one.

    Parameters
    ----------
    log : Path
        File to which every measurement appends a byte.
    group : int
        Measurements that wait for each other: each returns once its group has started.
    faults : mapping of int to str
        Fault of the measurement with a number: `CRASH`, `HANG`, `FAIL` or `DISK_FULL`.
    error : str
        Result of `check`.
    """

    kind: str = "cpu"
    log: Path = Path(os.devnull)
    group: int = 1
    faults: Mapping[int, str] = dataclasses.field(default_factory=dict)
    error: str = ""

    def measure(
        self, path: Path, arguments: tuple[KernelArgument, ...], seconds: float, timeout: float
    ) -> list[float]:
        """Return times that fall with the number of the measurement."""
        number = self._start()
        fault = self.faults.get(number)
        if fault == CRASH:
            os.kill(os.getpid(), signal.SIGSEGV)
        elif fault == HANG:
            signal.pause()
        elif fault == FAIL:
            raise RuntimeError("the device failed")
        elif fault == DISK_FULL:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        last_of_group = number - number % self.group + self.group
        while self.log.stat().st_size < last_of_group and self.group > 1:
            time.sleep(0.001)
        return [1.0 / (1 + number)] * 3

    def check(
        self,
        path: Path,
        arguments: tuple[KernelArgument, ...],
        outputs: int,
        function: tirx.PrimFunc,
        timeout: float,
    ) -> str:
        """Return the error that the test asked for."""
        return self.error

    def _start(self) -> int:
        """Return the number of measurements before this one, of all processes."""
        file = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        try:
            os.write(file, b".")
            return os.lseek(file, 0, os.SEEK_CUR) - 1
        finally:
            os.close(file)
