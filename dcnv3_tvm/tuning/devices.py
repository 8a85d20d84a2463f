"""Where candidates are measured: on this machine, or on others through TVM's RPC tracker."""

from __future__ import annotations

import dataclasses

from tvm.target import Target

from dcnv3_tvm import gpu, targets
from dcnv3_tvm.compiler.compile import target_info
from dcnv3_tvm.errors import TargetError
from dcnv3_tvm.runtime.loading import check_target
from dcnv3_tvm.tuning.jobs import Place
from dcnv3_tvm.tuning.journal import SessionError
from dcnv3_tvm.tuning.tracker import Address, count_servers


@dataclasses.dataclass(frozen=True)
class Devices:
    """Devices of one kind.

    Parameters
    ----------
    place : Place
        How a process reaches one of them.
    count : int
        Measurements at a time.
    fresh : bool
        Whether each measurement has a process of its own.
    overlap : bool
        Whether schedules are compiled while others are measured, undisturbed.
    retries : int
        How often a measurement that failed is tried again: the device may have been lost.
    name : str
        For people.
    """

    place: Place
    count: int
    fresh: bool
    overlap: bool
    retries: int
    name: str


def local_device(target: Target, *, threads: int, index: int = 0) -> Devices:
    """Measure on this machine, one schedule at a time.

    Parameters
    ----------
    target : tvm.target.Target
        What candidates are compiled for.
    threads : int
        Of the processor.
    index : int
        Of the GPU.

    Raises
    ------
    TargetError
        If this machine cannot run code for `target`.
    """
    try:
        check_target(target_info(target))
    except TargetError as error:
        raise TargetError(
            "schedules for the target cannot be measured on this machine",
            got=targets.target_slug(target),
            hint="Measure on one that can: --rpc HOST:PORT --rpc-key KEY. Why: " + error.problem,
        ) from error
    if targets.is_gpu(target):
        # A process of its own for each would spend more time on starting CUDA than on measuring.
        place = Place("cuda", index=index)
        return Devices(place, 1, False, True, 0, gpu.device(index).name)
    return Devices(Place("cpu", threads=threads), 1, True, False, 0, "this machine")


def remote_devices(
    target: Target, tracker: Address, key: str, *, workers: int, threads: int
) -> Devices:
    """Measure on servers that have registered with TVM's RPC tracker.

    Parameters
    ----------
    target : tvm.target.Target
        What candidates are compiled for.
    tracker : (str, int)
        Its host and port.
    key : str
        Under which the servers have registered.
    workers : int
        Measurements at a time: the number of servers.
    threads : int
        Of a server's processor.

    Raises
    ------
    SessionError
        If the tracker cannot be reached, or has no server of this key.
    MissingDependencyError
        If the packages that TVM needs for RPC are not installed.
    """
    address = f"{tracker[0]}:{tracker[1]}"
    if count_servers(tracker, key) == 0:
        raise SessionError(
            "the tracker has no server of this key",
            got=f"{key} at {address}",
            hint=f"On each device: dcnv3-tvm worker --tracker {address} --key {key}",
        )
    kind = "cuda" if targets.is_gpu(target) else "cpu"
    place = Place(kind, threads=threads, tracker=tracker, key=key)
    return Devices(place, workers, False, True, 2, f"{workers} x {key} at {address}")
