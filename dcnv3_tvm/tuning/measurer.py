"""Build and measure candidate schedules in parallel processes."""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Final

from tvm.target import Target

from dcnv3_tvm import files
from dcnv3_tvm.tuning.builder import build_candidate
from dcnv3_tvm.tuning.device_pool import DevicePool
from dcnv3_tvm.tuning.process_pool import Job, JobResult, ProcessPool
from dcnv3_tvm.tuning.tasks import Candidate

MEASURE_TIMEOUT: Final = 20.0
"""Default number of seconds after which a measurement is killed."""

_BUILD_TIMEOUT: Final = 120.0
_CHECK_TIMEOUT: Final = 300.0


class Measurer:
    """Builder processes, runner processes, and the folder of the libraries they exchange.

    Parameters
    ----------
    target : tvm.target.Target
        Target that candidates are compiled for.
    devices : DevicePool
        Devices to measure on.
    builders : int
        Number of processes that compile.
    seconds : float
        Time to spend on the calls of a measurement.
    timeout : float
        Seconds after which a measurement is killed.
    """

    def __init__(
        self,
        target: Target,
        devices: DevicePool,
        *,
        builders: int,
        seconds: float = 0.04,
        timeout: float = MEASURE_TIMEOUT,
    ) -> None:
        self._target, self.devices = target, devices
        self._seconds, self._timeout = seconds, timeout
        self._batches = 0
        self._builders = ProcessPool(builders, fresh=False)
        self._runners = ProcessPool(devices.size, fresh=devices.fresh_processes)
        self._folder = files.temporary_folder("tune-")

    def __enter__(self) -> Measurer:
        return self

    def __exit__(self, *_: object) -> None:
        self._builders.close()
        self._runners.close()
        self._folder.cleanup()

    def measure(self, batch: Sequence[Candidate]) -> Iterator[tuple[int, JobResult]]:
        """Build and measure candidates.

        Returns
        -------
        iterator of (int, JobResult)
            Index of each candidate and the median seconds of a call, in order of completion.
        """
        failed: list[tuple[int, JobResult]] = []

        def built() -> Iterator[int]:
            results = self._build(batch)
            # Compiling uses all cores: finish it before measuring on the same CPU.
            for number, result in results if self.devices.overlap_builds else list(results):
                if result.error:
                    failed.append((number, result))
                else:
                    yield number

        pending: Iterable[int] = built()
        for retries_left in reversed(range(self.devices.retries + 1)):
            retry: list[int] = []
            for number, result in self._run(batch, pending):
                if result.error and retries_left:
                    retry.append(number)
                else:
                    yield number, result
            pending = retry
        yield from failed

    def measure_in_turns(self, batch: Sequence[Candidate], rounds: int) -> list[float]:
        """Build candidates and measure each once per round, for a fair comparison.

        The built libraries remain available to `check` until the next call that builds.

        Returns
        -------
        list of float
            Best time of each candidate in seconds, as disturbances only make a measurement
            longer; infinity for a candidate that fails.
        """
        usable = [number for number, result in self._build(batch) if not result.error]
        turns = [number for _ in range(rounds) for number in sorted(usable)]
        times = [math.inf] * len(batch)
        for number, result in self._run(batch, turns):
            if not result.error:
                times[number] = min(times[number], result.value)
        return times

    def check(self, number: int, candidate: Candidate) -> str:
        """Check the result of a candidate of the last batch; return a description of the error."""
        job = functools.partial(
            self.devices.runner.check,
            self._library(number),
            candidate.task.arguments,
            candidate.task.outputs,
            candidate.task.reference,
            _CHECK_TIMEOUT,
        )
        ((_, result),) = self._runners.run([job], timeout=_CHECK_TIMEOUT)
        return result.error or str(result.value)

    def _build(self, batch: Sequence[Candidate]) -> Iterator[tuple[int, JobResult]]:
        for path in Path(self._folder.name).iterdir():
            path.unlink()
        # New names for each batch: a process that has loaded a path would reuse the old library.
        self._batches += 1
        return self._builders.run(
            [
                functools.partial(
                    build_candidate,
                    candidate.task.function,
                    self._target,
                    candidate.decisions,
                    self._library(number),
                )
                for number, candidate in enumerate(batch)
            ],
            timeout=_BUILD_TIMEOUT,
        )

    def _run(
        self, batch: Sequence[Candidate], numbers: Iterable[int]
    ) -> Iterator[tuple[int, JobResult]]:
        """Time built candidates, whose indices are consumed when a process is free."""
        taken: list[int] = []

        def measurements() -> Iterator[Job]:
            for number in numbers:
                taken.append(number)
                yield functools.partial(
                    self.devices.runner.measure,
                    self._library(number),
                    batch[number].task.arguments,
                    self._seconds,
                    self._timeout,
                )

        for position, result in self._runners.run(measurements(), timeout=self._timeout):
            median = result if result.error else JobResult(statistics.median(result.value))
            yield taken[position], median

    def _library(self, number: int) -> Path:
        return Path(self._folder.name) / f"{self._batches}-{number}.so"
