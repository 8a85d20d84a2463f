"""GPUs as a few rates, for what can be said about a kernel before there is one to run it on."""

from __future__ import annotations

import dataclasses
from typing import Final

from dcnv3_tvm.bench.floors import Peaks
from dcnv3_tvm.errors import InvalidArgumentError


@dataclasses.dataclass(frozen=True)
class OnChip:
    """What is between a GPU's memory and its arithmetic.

    Parameters
    ----------
    multiprocessors : int
        Each with an L1 cache and shared memory.
    clock : float
        Of them at most, in Hz.
    bytes : float
        Bytes a second between the L2 cache and all of them.
    how : str
        Where the numbers are from.
    """

    multiprocessors: int
    clock: float
    bytes: float
    how: str


@dataclasses.dataclass(frozen=True)
class DeviceModel:
    """A GPU.

    Parameters
    ----------
    target : str
        What kernels for it are compiled for.
    peaks : Peaks
        Its rates, and where they are from.
    on_chip : OnChip
        The same of its caches.
    """

    target: str
    peaks: Peaks
    on_chip: OnChip


_LEVEL_TWO: Final = 5120
"""Bytes a clock that an A100's L2 cache delivers, by NVIDIA's white paper on it.

NVIDIA gives no number for Hopper. This one is taken for it too, at its highest clock: a bound from
below must not be too slow, and what is published of measurements is less.
"""

_HOPPER: Final = OnChip(
    multiprocessors=132,
    clock=1.98e9,
    bytes=_LEVEL_TWO * 1.98e9,
    how="multiprocessors by NVIDIA's data sheet, the clock at which they make its 67 TFLOP/s, "
    "L2 as many bytes a clock as NVIDIA documents of the A100, as it documents none of Hopper",
)

DEVICE_MODELS: Final = {
    "h200": DeviceModel(
        "cuda-sm90",
        Peaks(
            flops=67e12,
            bytes=4.3e12,
            how="of an H200, measured: a copy, products of float32 on CUDA cores, products of "
            "bfloat16 on tensor cores",
            half_flops=790e12,
        ),
        _HOPPER,
    ),
    "h100": DeviceModel(
        "cuda-sm90",
        Peaks(
            flops=67e12,
            bytes=3.35e12,
            how="of an H100 SXM, NVIDIA's data sheet: what no program reaches",
            half_flops=989e12,
        ),
        _HOPPER,
    ),
    "a100": DeviceModel(
        "cuda-sm80",
        Peaks(
            flops=19.5e12,
            bytes=2.039e12,
            how="of an A100 SXM of 80 GB, NVIDIA's data sheet: what no program reaches",
            half_flops=312e12,
        ),
        OnChip(
            multiprocessors=108,
            clock=1.41e9,
            bytes=_LEVEL_TWO * 1.41e9,
            how="all by NVIDIA's white paper",
        ),
    ),
}
"""By name."""


def device_model(name: str) -> DeviceModel:
    """Find a GPU by name.

    Raises
    ------
    InvalidArgumentError
        If there is none of this name.
    """
    if name not in DEVICE_MODELS:
        raise InvalidArgumentError(
            "there is no such device model", got=repr(name), allowed=", ".join(DEVICE_MODELS)
        )
    return DEVICE_MODELS[name]
