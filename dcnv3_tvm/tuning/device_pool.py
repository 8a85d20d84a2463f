"""Devices to measure on: this machine's, or remote ones through TVM's RPC tracker."""

from __future__ import annotations

import dataclasses

from tvm.target import Target

from dcnv3_tvm import gpu, targets
from dcnv3_tvm.compiler.target_info import target_info
from dcnv3_tvm.errors import TargetError, TuningError
from dcnv3_tvm.provenance import cpu_description
from dcnv3_tvm.runtime.loading import check_target
from dcnv3_tvm.tuning.rpc import RpcConfig, count_servers
from dcnv3_tvm.tuning.runner import KernelRunner


@dataclasses.dataclass(frozen=True)
class DevicePool:
    """Identical devices.

    Parameters
    ----------
    runner : KernelRunner
        Runs kernels on one of them.
    hardware : str
        Description of the devices, stored in tuning records.
    size : int
        Measurements that run at the same time.
    fresh_processes : bool
        Use a new process for each measurement.
    overlap_builds : bool
        Compile candidates while others are measured; on a CPU that would disturb measurements.
    retries : int
        Times a failed measurement is repeated, because the device may have been lost.
    """

    runner: KernelRunner
    hardware: str
    size: int = 1
    fresh_processes: bool = True
    overlap_builds: bool = False
    retries: int = 0


def check_measurable(target: Target) -> None:
    """Check that this machine can measure schedules for a target.

    Raises
    ------
    TargetError
        If it cannot run code for the target.
    """
    try:
        check_target(target_info(target, amx=True))
    except TargetError as error:
        raise TargetError(
            "this machine cannot run code for the target, so it cannot measure schedules",
            got=targets.target_slug(target),
            hint="Measure on a machine that can: --rpc HOST:PORT --rpc-key KEY. "
            f"Reason: {error.problem}",
        ) from error


def local_device(target: Target, *, threads: int, index: int = 0) -> DevicePool:
    """Return this machine's CPU or GPU.

    Parameters
    ----------
    target : tvm.target.Target
        Target that candidates are compiled for.
    threads : int
        Threads on a CPU.
    index : int
        Index of the GPU.

    Raises
    ------
    TargetError
        If this machine cannot run code for `target`.
    """
    check_measurable(target)
    if targets.is_gpu(target):
        # A process for each measurement would spend more time on starting CUDA than on measuring.
        return DevicePool(
            KernelRunner("cuda", index=index),
            hardware=gpu.device(index).name,
            fresh_processes=False,
            overlap_builds=True,
        )
    return DevicePool(KernelRunner("cpu", threads=threads), hardware=cpu_description())


def remote_devices(target: Target, rpc: RpcConfig, *, threads: int) -> DevicePool:
    """Return the servers registered with TVM's RPC tracker.

    Parameters
    ----------
    target : tvm.target.Target
        Target that candidates are compiled for.
    rpc : RpcConfig
        The tracker and the key of the servers.
    threads : int
        Threads on a server's CPU.

    Raises
    ------
    TuningError
        If the tracker cannot be reached, or no server is registered under the key.
    MissingDependencyError
        If a package that TVM's RPC needs is not installed.
    """
    if count_servers(rpc) == 0:
        raise TuningError(
            "the tracker has no server for this key",
            got=f"{rpc.key} at {rpc.address}",
            hint=f"Run on each device: dcnv3-tvm worker --tracker {rpc.address} --key {rpc.key}",
        )
    kind = "cuda" if targets.is_gpu(target) else "cpu"
    return DevicePool(
        KernelRunner(kind, threads=threads, rpc=rpc),
        hardware=f"{rpc.workers} x {rpc.key} at {rpc.address}",
        size=rpc.workers,
        fresh_processes=False,
        overlap_builds=True,
        retries=2,
    )
