"""Contestants of a case on a GPU: built, compared, and timed by its clock."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from dcnv3_tvm.bench.budget import Allowance, NoTimeError
from dcnv3_tvm.bench.contestants import MAX, Contestant
from dcnv3_tvm.bench.device import Device, tensor_error
from dcnv3_tvm.bench.floors import Floors, Peaks
from dcnv3_tvm.bench.gpu_build import Builds
from dcnv3_tvm.bench.measure import Plan
from dcnv3_tvm.bench.report import CaseResult, Row
from dcnv3_tvm.bench.runner import compete, first_line


@dataclasses.dataclass(frozen=True)
class Setting:
    """Where and with what the cases of a part of a run are measured.

    Parameters
    ----------
    device : Device
        To measure on.
    builds : Builds
        What this library's kernels and encoders come from.
    compiling : Allowance
        Time for ``torch.compile``.
    peaks : Peaks
        Of the device.
    on_step : callable
        Called with what happens next.
    """

    device: Device
    builds: Builds
    compiling: Allowance
    peaks: Peaks
    on_step: Callable[[str], None]


def contest(
    slug: str,
    makers: Mapping[str, Callable[[], Contestant]],
    reference: Sequence[Tensor],
    floors: Floors,
    plan: Plan,
    device: Device,
    *,
    flushes: int,
    measure_error: str = MAX,
    on_step: Callable[[str], None] = lambda _: None,
) -> CaseResult:
    """Build all contestants, compare their outputs, and time those that are right.

    Parameters
    ----------
    slug : str
        Name of the case.
    makers : mapping of str to callable
        What makes each contestant ready, in the order of their turns.
    reference : sequence of Tensor
        The true outputs.
    floors : Floors
        Least times.
    plan : Plan
        How often to call.
    device : Device
        To measure on.
    flushes : int
        As of `Device.flush`, before every call.
    measure_error : str
        How errors are measured, see `dcnv3_tvm.bench.contestants.error_of`.
    on_step : callable
        Called with what happens next.
    """
    contestants: list[Contestant] = []
    failures: list[Row] = []
    for name, make in makers.items():
        on_step(f"{slug}: build {name}")
        try:
            contestants.append(make())
        except NoTimeError as late:
            failures.append(Row(name, failure=str(late)))
        except Exception as error:
            # What cannot be built is a result too, whatever its library raises.
            failures.append(Row(name, failure=first_line(error)))
    flush = device.flush(flushes)
    return compete(
        slug,
        reference,
        contestants,
        failures,
        floors,
        plan,
        on_step,
        measure_error=measure_error,
        error=tensor_error,
        forgiving=True,
        before={contestant.name: flush for contestant in contestants},
        seconds_of=device.seconds_of,
    )
