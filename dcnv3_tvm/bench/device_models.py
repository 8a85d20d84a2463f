"""GPUs as a few rates, for what can be said about a kernel before there is one to run it on."""

from __future__ import annotations

import dataclasses
from typing import Final

from dcnv3_tvm.bench.floors import Peaks
from dcnv3_tvm.errors import InvalidArgumentError


@dataclasses.dataclass(frozen=True)
class DeviceModel:
    """A GPU.

    Parameters
    ----------
    target : str
        What kernels for it are compiled for.
    peaks : Peaks
        Its rates, and where they are from.
    """

    target: str
    peaks: Peaks


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
    ),
    "h100": DeviceModel(
        "cuda-sm90",
        Peaks(
            flops=67e12,
            bytes=3.35e12,
            how="of an H100 SXM, NVIDIA's data sheet: what no program reaches",
            half_flops=989e12,
        ),
    ),
    "a100": DeviceModel(
        "cuda-sm80",
        Peaks(
            flops=19.5e12,
            bytes=2.039e12,
            how="of an A100 SXM of 80 GB, NVIDIA's data sheet: what no program reaches",
            half_flops=312e12,
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
