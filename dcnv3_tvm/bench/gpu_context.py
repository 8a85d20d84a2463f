"""What the cases of a GPU run share: the GPU, compiled kernels, time and peak rates."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from dcnv3_tvm.bench.backends import Builders
from dcnv3_tvm.bench.budget import JobBudget
from dcnv3_tvm.bench.comparison import compare_backends
from dcnv3_tvm.bench.gpu_compilation import CompilePool
from dcnv3_tvm.bench.measure import Plan
from dcnv3_tvm.bench.report import CaseResult
from dcnv3_tvm.bench.roofline import Peaks, Roofline
from dcnv3_tvm.bench.runners import BackendRunner
from dcnv3_tvm.bench.torch_gpu import TorchGpu
from dcnv3_tvm.verify.tolerances import MAX_ERROR


@dataclasses.dataclass(frozen=True)
class GpuContext:
    """Context of the cases of one part of a GPU run.

    Parameters
    ----------
    gpu : TorchGpu
        The GPU.
    pool : CompilePool
        Compiles this library's kernels and encoders.
    torch_compile : JobBudget
        Time for ``torch.compile``.
    peaks : Peaks
        Peak rates of the GPU.
    on_step : callable
        Called with a description of each step before it runs.
    """

    gpu: TorchGpu
    pool: CompilePool
    torch_compile: JobBudget
    peaks: Peaks
    on_step: Callable[[str], None]

    def runner(
        self, call: Callable[[], Any], outputs: Callable[[Any], list[Any]], held: int
    ) -> BackendRunner:
        """Return a runner whose peak memory is `held` bytes and what some calls allocate."""
        return BackendRunner(call, outputs, held + self.gpu.peak_bytes(call))

    def compare(
        self,
        slug: str,
        builders: Builders,
        references: Sequence[Tensor],
        roofline: Roofline,
        plan: Plan,
        *,
        flushes: int,
        error_measure: str = MAX_ERROR,
    ) -> CaseResult:
        """Compare backends, with the L2 cache flushed before every call.

        Parameters
        ----------
        slug, builders, references, roofline, plan, error_measure
            As for `dcnv3_tvm.bench.comparison.compare_backends`.
        flushes : int
            Repeats of `TorchGpu.flush` before every call.
        """
        return compare_backends(
            slug,
            builders,
            references,
            roofline,
            plan,
            error_measure=error_measure,
            keep_going=True,
            on_step=self.on_step,
            before=self.gpu.flush(flushes),
            seconds_of=self.gpu.seconds_of,
        )
