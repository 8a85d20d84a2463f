"""Compile operators and encoders in parallel processes while others are measured.

No GPU is needed: what is compiled for ``cuda-sm90`` here can be measured on another machine.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import multiprocessing
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Final

from dcnv3_tvm import machine, targets
from dcnv3_tvm.bench.budget import OutOfTimeError
from dcnv3_tvm.bench.cases import EncoderCase
from dcnv3_tvm.bench.gpu_cases import CompileJob, GradientKernel, OperatorGroup, compile_jobs
from dcnv3_tvm.bench.report import failure_text
from dcnv3_tvm.runtime import kernel_runtime
from dcnv3_tvm.runtime.kernel import Kernel, KernelLibrary
from dcnv3_tvm.runtime.metadata import TargetInfo

_RUNTIME: Final = "runtime"
"""Folder of TVM's runtime libraries, next to the results."""


def compiled_path(job: CompileJob, folder: Path) -> Path:
    """Return the path of a job's result: a library, or the folder of an artifact."""
    return folder / (job.slug if isinstance(job, EncoderCase) else f"{job.slug}.so")


def compile_job(job: CompileJob, folder: Path, target: str) -> Path:
    """Compile a kernel or an encoder, unless the result exists.

    Parameters
    ----------
    job : DCNv3Spec, GradientKernel or EncoderCase
        The kernel, or the encoder, which gets random weights.
    folder : Path
        Folder of the results.
    target : str
        The GPU, for example ``"cuda-sm90"``.
    """
    path = compiled_path(job, folder)
    if path.exists():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    if not isinstance(job, EncoderCase):
        from dcnv3_tvm import files
        from dcnv3_tvm.compiler.compile_kernel import DCNV3, compile_kernel

        kind, spec = job if isinstance(job, GradientKernel) else (DCNV3, job)
        kernel = compile_kernel(kind, spec, targets.target_text(target), "default")
        code = kernel.library.code
        with files.atomic_file(path) as temporary:
            temporary.write_bytes(code)
    else:
        from dcnv3_tvm import frontend
        from dcnv3_tvm.compiler.compile import compile_artifact
        from dcnv3_tvm.verify.random_weights import randomize_

        model = randomize_(frontend.create_model(job.variant, features_only=job.features), seed=0)
        imported = frontend.import_model(model, example=(job.batch, 3, *job.size))
        compile_artifact(imported, path, target=target, dtype=job.dtype)
    return path


def load_kernel(kind: str, path: Path, target: str) -> Kernel:
    """Load a kernel that `compile_job` compiled. TVM is not needed after `compile_ahead`.

    Parameters
    ----------
    kind : str
        Name of its function.
    path : Path
        The library.
    target : str
        The GPU, for example ``"cuda-sm90"``.
    """
    kernel_runtime.load_runtime(path.parent / _RUNTIME)
    arch = target.replace("cuda-sm", "sm_")
    code = KernelLibrary(path.read_bytes(), on_gpu=True)
    return Kernel(kind, TargetInfo("cuda", arch=arch), code)


def _use_one_thread() -> None:
    """Limit a worker to one core; PyTorch reads the variable when it is imported."""
    os.environ["OMP_NUM_THREADS"] = "1"


class CompilePool:
    """Jobs compiled by worker processes, in the order in which they are submitted.

    Parameters
    ----------
    folder : Path
        Folder of the results; existing ones are reused.
    target : str
        The GPU.
    workers : int
        Number of processes.
    """

    def __init__(self, folder: Path, target: str, workers: int) -> None:
        self._folder = folder
        self._target = target
        # Spawn, because processes with the threads of PyTorch and TVM cannot be forked.
        self._pool = concurrent.futures.ProcessPoolExecutor(
            workers, multiprocessing.get_context("spawn"), _use_one_thread
        )
        self._futures: dict[CompileJob, concurrent.futures.Future[Path]] = {}

    def submit(self, jobs: Iterable[CompileJob]) -> None:
        """Start to compile."""
        for job in jobs:
            if job not in self._futures:
                self._futures[job] = self._pool.submit(compile_job, job, self._folder, self._target)

    def result(self, job: CompileJob, seconds: float | None = None) -> Path:
        """Wait for a job and return the path of its result; raises the error of the compilation.

        Raises
        ------
        OutOfTimeError
            If it takes longer than `seconds`.
        """
        try:
            return self._futures[job].result(timeout=seconds)
        except concurrent.futures.TimeoutError as error:
            raise OutOfTimeError("not compiled in time") from error

    def __enter__(self) -> CompilePool:
        return self

    def __exit__(self, *_: object) -> None:
        # Running jobs finish within about a minute; pending ones are cancelled.
        self._pool.shutdown(wait=False, cancel_futures=True)


@dataclasses.dataclass(frozen=True)
class CompiledJobs:
    """Result of `compile_ahead`.

    Parameters
    ----------
    target : str
        The GPU.
    compiled : tuple of str
        Slugs of compiled operators and encoders.
    failed : dict of str to str
        Errors of the others, by slug.
    """

    target: str
    compiled: tuple[str, ...]
    failed: dict[str, str]

    @property
    def ok(self) -> bool:
        """Whether everything was compiled."""
        return not self.failed

    def to_json(self) -> dict[str, Any]:
        """Return plain values for ``json.dumps``."""
        return dataclasses.asdict(self)


def compile_ahead(
    groups: Sequence[OperatorGroup],
    cases: Sequence[EncoderCase],
    *,
    artifacts: Path,
    target: str,
    on_step: Callable[[str], None] = lambda _: None,
) -> CompiledJobs:
    """Compile what `dcnv3_tvm.bench.gpu.run_gpu` reads from a folder of artifacts.

    Parameters
    ----------
    groups, cases, artifacts, on_step
        As for `dcnv3_tvm.bench.gpu.run_gpu`.
    target : str
        The GPU, for example ``"cuda-sm90"``; it need not be in this machine.

    Raises
    ------
    TargetError
        If the target is not a supported GPU.
    """
    targets.resolve_gpu(target)
    kernel_runtime.copy_runtime(artifacts / _RUNTIME)
    compiled, failed = [], {}
    jobs = compile_jobs(groups, cases)
    with CompilePool(artifacts, target, machine.physical_cores()) as pool:
        pool.submit(jobs)
        for number, job in enumerate(jobs):
            on_step(f"{number + 1} of {len(jobs)}: {job.slug}")
            try:
                pool.result(job)
            except Exception as error:  # a failed job is a result, and does not stop the others
                failed[job.slug] = failure_text(error)
            else:
                compiled.append(job.slug)
    return CompiledJobs(target, tuple(compiled), failed)
