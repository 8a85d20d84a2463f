"""A device that only pretends: it sleeps, crashes and hangs as told, to test sessions with."""

from __future__ import annotations

import dataclasses
import errno
import os
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from tvm import tirx

from dcnv3_tvm.compiler.kernel_listing import Tensor
from dcnv3_tvm.tuning.jobs import Place

CRASH: Final = "crash"
HANG: Final = "hang"
FAIL: Final = "fail"
FULL: Final = "full"


@dataclasses.dataclass(frozen=True)
class SimulatedPlace(Place):
    """A device whose measurements take a fixed time.

    Parameters
    ----------
    log : Path
        File to which every measurement adds a byte, by which they are numbered.
    sleep : float
        Seconds of a measurement.
    faults : mapping of int to str
        What happens in the measurement of a number: `CRASH`, `HANG`, `FAIL` or `FULL`.
    wrong : str
        What is wrong with every result; empty if nothing is.
    """

    kind: str = "cpu"
    log: Path = Path(os.devnull)
    sleep: float = 0.0
    faults: Mapping[int, str] = dataclasses.field(default_factory=dict)
    wrong: str = ""

    def measure(
        self, path: Path, arguments: tuple[Tensor, ...], seconds: float, timeout: float
    ) -> list[float]:
        """Pretend: the first measurement is the slowest, each later one a little faster."""
        number = self._count()
        fault = self.faults.get(number)
        if fault == CRASH:
            os.kill(os.getpid(), signal.SIGSEGV)
        elif fault == HANG:
            time.sleep(3600)
        elif fault == FAIL:
            raise RuntimeError("the device says no")
        elif fault == FULL:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        time.sleep(self.sleep)
        return [1.0 / (1 + number)] * 3

    def compare(
        self, path: Path, arguments: tuple[Tensor, ...], function: tirx.PrimFunc, timeout: float
    ) -> str:
        """Say what was told to be wrong."""
        return self.wrong

    def _count(self) -> int:
        """Return the number of measurements before this one, of all processes."""
        file = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        try:
            os.write(file, b".")
            return os.lseek(file, 0, os.SEEK_CUR) - 1
        finally:
            os.close(file)
