"""Kernels and encoders compiled side by side, each in a process of its own, while others measure.

It needs no GPU: what is compiled here for ``cuda-sm90`` can be measured elsewhere.
"""

from __future__ import annotations

import concurrent.futures
import multiprocessing
import os
from collections.abc import Iterable
from pathlib import Path

from dcnv3_tvm.bench.budget import NoTimeError
from dcnv3_tvm.bench.cases import EncoderCase
from dcnv3_tvm.spec import DCNv3Spec

Job = DCNv3Spec | EncoderCase
"""What is compiled."""


def built_path(job: Job, folder: Path) -> Path:
    """Return where in a folder a job's result lies: a library, or an artifact's folder."""
    return folder / (f"{job.slug}.so" if isinstance(job, DCNv3Spec) else job.slug)


def build(job: Job, folder: Path, target: str) -> Path:
    """Compile a job, unless its result is there already.

    Parameters
    ----------
    job : DCNv3Spec or EncoderCase
        An operator, or an encoder with the weights of `dcnv3_tvm.verify.random_weights.randomize_`.
    folder : Path
        Where results go.
    target : str
        The GPU, for example ``"cuda-sm90"``.
    """
    path = built_path(job, folder)
    if path.exists():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(job, DCNv3Spec):
        from dcnv3_tvm import files
        from dcnv3_tvm.compiler.operator import compile_op

        code = compile_op(job, target=target).executable.code
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


def _only_one_thread() -> None:
    """Keep a worker to its core; PyTorch reads this when it is imported."""
    os.environ["OMP_NUM_THREADS"] = "1"


class Builds:
    """Jobs that are being compiled; those submitted first come first.

    Parameters
    ----------
    folder : Path
        Where results go, and what is there already is taken from.
    target : str
        The GPU.
    workers : int
        Processes.
    """

    def __init__(self, folder: Path, target: str, workers: int) -> None:
        self._folder = folder
        self._target = target
        # Fresh processes: PyTorch and TVM have threads, and so cannot be forked.
        self._pool = concurrent.futures.ProcessPoolExecutor(
            workers, multiprocessing.get_context("spawn"), _only_one_thread
        )
        self._futures: dict[Job, concurrent.futures.Future[Path]] = {}

    def submit(self, jobs: Iterable[Job]) -> None:
        """Begin to compile."""
        for job in jobs:
            if job not in self._futures:
                self._futures[job] = self._pool.submit(build, job, self._folder, self._target)

    def result(self, job: Job, seconds: float | None = None) -> Path:
        """Wait for a job and return what it has written; raises what compiling it raised.

        Raises
        ------
        NoTimeError
            If it takes longer than so many seconds.
        """
        try:
            return self._futures[job].result(timeout=seconds)
        except concurrent.futures.TimeoutError as error:
            raise NoTimeError("not compiled in time") from error

    def __enter__(self) -> Builds:
        return self

    def __exit__(self, *_: object) -> None:
        # What has not begun is given up; what has, ends within a minute.
        self._pool.shutdown(wait=False, cancel_futures=True)
