"""Matmuls and convolutions as GEMMs on GPUs: on tensor cores, or by threads in float32."""

from __future__ import annotations

from tvm import s_tir, tirx
from tvm.target import Target

from dcnv3_tvm.kernels.gemm import KERNEL
from dcnv3_tvm.schedules.gpu.gemm_float32 import schedule_by_threads
from dcnv3_tvm.schedules.gpu.gemm_tensor_core import schedule_on_tensor_cores
from dcnv3_tvm.schedules.gpu.launch import set_min_blocks
from dcnv3_tvm.schedules.rule import Refusal, refuse_other_kernels
from dcnv3_tvm.schedules.space import SearchSpace


def gemm(func: tirx.PrimFunc, target: Target, space: SearchSpace) -> tirx.PrimFunc | Refusal:
    """Schedule the kernels of `dcnv3_tvm.kernels.gemm`.

    A block computes a tile of the output and keeps the sums in registers. Step by step along the
    depth it copies rows and weights to shared memory while earlier steps are multiplied: on tensor
    cores in float16 and bfloat16, by threads in float32. Consecutive blocks share rows, which then
    come from the L2 cache.
    """
    if refusal := refuse_other_kernels(func, KERNEL):
        return refusal
    sch = s_tir.Schedule(func)
    if str(func.params[1].dtype) == "float32":
        schedule_by_threads(sch, space)
    else:
        schedule_on_tensor_cores(sch, target, space)
    return set_min_blocks(sch.mod["main"], target, space)
