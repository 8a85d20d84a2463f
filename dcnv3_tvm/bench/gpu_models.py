"""Peak rates of GPUs, for the roofline of kernels without a GPU to run them on."""

from __future__ import annotations

import dataclasses
from typing import Final

from dcnv3_tvm.bench.roofline import Peaks
from dcnv3_tvm.errors import InvalidArgumentError


@dataclasses.dataclass(frozen=True)
class GpuModel:
    """A GPU: target to compile for, and its peak rates."""

    target: str
    peaks: Peaks


GPU_MODELS: Final = {
    "h200": GpuModel(
        "cuda-sm90",
        Peaks(
            flops=67e12,
            bytes=4.3e12,
            half_flops=790e12,
            how="measured on an H200: a copy, float32 matmuls on CUDA cores, bfloat16 matmuls on "
            "tensor cores",
        ),
    ),
    "h100": GpuModel(
        "cuda-sm90",
        Peaks(
            flops=67e12,
            bytes=3.35e12,
            half_flops=989e12,
            how="NVIDIA's data sheet of the H100 SXM, which no program reaches",
        ),
    ),
    "a100": GpuModel(
        "cuda-sm80",
        Peaks(
            flops=19.5e12,
            bytes=2.039e12,
            half_flops=312e12,
            how="NVIDIA's data sheet of the A100 SXM 80 GB, which no program reaches",
        ),
    ),
}
"""GPUs by the value of ``--device-model``."""


def gpu_model(name: str) -> GpuModel:
    """Return a GPU by name.

    Raises
    ------
    InvalidArgumentError
        If the name is unknown.
    """
    if name not in GPU_MODELS:
        raise InvalidArgumentError(
            "unknown device model", got=repr(name), allowed=", ".join(GPU_MODELS)
        )
    return GPU_MODELS[name]
