"""Compile and measure candidates: the schedules of kernels that a session tries."""

from __future__ import annotations

import functools
import math
import statistics
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Final, NamedTuple

from tvm.target import Target

from dcnv3_tvm.schedules.space import Decision
from dcnv3_tvm.tuning import jobs
from dcnv3_tvm.tuning.devices import Devices
from dcnv3_tvm.tuning.pool import Job, Outcome, Pool
from dcnv3_tvm.tuning.tasks import Task

_BUILD_TIMEOUT: Final = 120.0
_CHECK_TIMEOUT: Final = 300.0


class Candidate(NamedTuple):
    """A schedule of a kernel.

    Parameters
    ----------
    task : Task
        The kernel.
    decisions : dict of str to Decision
        Of its rule.
    """

    task: Task
    decisions: dict[str, Decision]


class Laboratory:
    """Processes that compile, processes that measure, and a folder between them.

    Parameters
    ----------
    target : tvm.target.Target
        What candidates are compiled for.
    devices : Devices
        Where they are measured.
    builders : int
        Processes that compile.
    seconds : float
        To spend on the calls of a measurement.
    timeout : float
        Seconds that a measurement may take.
    """

    def __init__(
        self,
        target: Target,
        devices: Devices,
        *,
        builders: int,
        seconds: float = 0.04,
        timeout: float = 20.0,
    ) -> None:
        self._target, self.devices = target, devices
        self._seconds, self._timeout = seconds, timeout
        self._batches = 0
        self._builders = Pool(builders, fresh=False)
        self._runners = Pool(devices.count, fresh=devices.fresh)
        self._folder = tempfile.TemporaryDirectory(prefix="dcnv3-tvm-tune-")

    def __enter__(self) -> Laboratory:
        return self

    def __exit__(self, *_: object) -> None:
        self._builders.close()
        self._runners.close()
        self._folder.cleanup()

    def measure(self, batch: Sequence[Candidate]) -> Iterator[tuple[int, Outcome]]:
        """Compile and measure candidates.

        Returns
        -------
        iterator of (int, Outcome)
            The number of each candidate, and the median seconds of a call, as they are known.
        """
        failed: list[tuple[int, Outcome]] = []

        def built() -> Iterator[int]:
            outcomes = self._build(batch)
            # Compiling takes all cores, on which nothing is to be measured meanwhile.
            for number, outcome in outcomes if self.devices.overlap else list(outcomes):
                if outcome.error:
                    failed.append((number, outcome))
                else:
                    yield number

        waiting: Iterable[int] = built()
        for retries in reversed(range(self.devices.retries + 1)):
            again: list[int] = []
            for number, outcome in self._measured(batch, waiting):
                if outcome.error and retries:
                    again.append(number)
                else:
                    yield number, outcome
            waiting = again
        yield from failed

    def measure_in_turns(self, batch: Sequence[Candidate], rounds: int) -> list[float]:
        """Measure candidates against each other.

        Returns
        -------
        list of float
            Seconds of each in its best turn: what disturbs a measurement only adds to it.
            Infinite for one that fails. What was compiled stays for `check` until the next call of
            a method that compiles.
        """
        usable = [number for number, outcome in self._build(batch) if not outcome.error]
        turns = [number for _ in range(rounds) for number in sorted(usable)]
        times = [math.inf] * len(batch)
        for number, outcome in self._measured(batch, turns):
            if not outcome.error:
                times[number] = min(times[number], outcome.value)
        return times

    def check(self, number: int, candidate: Candidate) -> str:
        """Hold a candidate of the last batch against the reference; return what is wrong."""
        job = functools.partial(
            self.devices.place.compare,
            self._library(number),
            candidate.task.arguments,
            candidate.task.function,
            _CHECK_TIMEOUT,
        )
        ((_, outcome),) = self._runners.run([job], timeout=_CHECK_TIMEOUT)
        return outcome.error or str(outcome.value)

    def _build(self, batch: Sequence[Candidate]) -> Iterator[tuple[int, Outcome]]:
        for path in Path(self._folder.name).iterdir():
            path.unlink()
        # Not the names of before: a process that has such a library open would take that one.
        self._batches += 1
        return self._builders.run(
            [
                functools.partial(
                    jobs.build,
                    candidate.task.function,
                    self._target,
                    candidate.decisions,
                    self._library(number),
                )
                for number, candidate in enumerate(batch)
            ],
            timeout=_BUILD_TIMEOUT,
        )

    def _measured(
        self, batch: Sequence[Candidate], numbers: Iterable[int]
    ) -> Iterator[tuple[int, Outcome]]:
        """Measure compiled candidates, whose numbers are taken when there is a process for them."""
        taken: list[int] = []

        def measurements() -> Iterator[Job]:
            for number in numbers:
                taken.append(number)
                yield functools.partial(
                    self.devices.place.measure,
                    self._library(number),
                    batch[number].task.arguments,
                    self._seconds,
                    self._timeout,
                )

        for position, outcome in self._runners.run(measurements(), timeout=self._timeout):
            median = outcome if outcome.error else Outcome(statistics.median(outcome.value))
            yield taken[position], median

    def _library(self, number: int) -> Path:
        return Path(self._folder.name) / f"{self._batches}-{number}.so"
