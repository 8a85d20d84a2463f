"""What the cases of a GPU run share: the GPU, compiled kernels, time and peak rates."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from dcnv3_tvm.bench.backends import Backend
from dcnv3_tvm.bench.budget import JobBudget
from dcnv3_tvm.bench.comparison import compare_backends
from dcnv3_tvm.bench.gpu_compilation import CompilePool
from dcnv3_tvm.bench.measure import Plan
from dcnv3_tvm.bench.report import CaseResult
from dcnv3_tvm.bench.roofline import Peaks, Roofline
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

    def compare(
        self,
        slug: str,
        builders: Mapping[str, Callable[[], Backend]],
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
        slug, references, roofline, plan, error_measure
            As for `dcnv3_tvm.bench.comparison.compare_backends`.
        builders : mapping of str to callable
            Builder of each backend.
        flushes : int
            Repeats of `TorchGpu.flush` before every call.
        """

        def in_list(build: Callable[[], Backend]) -> Callable[[], list[Backend]]:
            return lambda: [build()]

        return compare_backends(
            slug,
            {name: in_list(build) for name, build in builders.items()},
            references,
            roofline,
            plan,
            error_measure=error_measure,
            keep_going=True,
            on_step=self.on_step,
            before=self.gpu.flush(flushes),
            seconds_of=self.gpu.seconds_of,
        )
