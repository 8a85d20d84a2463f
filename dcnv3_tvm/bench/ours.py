"""The contestants that are this library: as it is, and without its tuning records."""

from __future__ import annotations

from typing import Any

import numpy as np

from dcnv3_tvm import frontend
from dcnv3_tvm.bench.contestants import OURS, Contestant
from dcnv3_tvm.bench.problems import Problem
from dcnv3_tvm.bench.sessions import Session, of_ours
from dcnv3_tvm.compiler.compile import compile_model
from dcnv3_tvm.compiler.operator import compile_op
from dcnv3_tvm.frontend.models.internimage import InternImage
from dcnv3_tvm.runtime import CompiledModel, library
from dcnv3_tvm.spec import DCNv3Spec


def build(problem: Problem, threads: int) -> list[Contestant]:
    """Compile the problem for this machine.

    Parameters
    ----------
    problem : Problem
        An operator or an encoder.
    threads : int
        Threads to compute with.

    Returns
    -------
    list of Contestant
        The call as users make it; for an operator also its kernel alone, without the checks of
        the call and with the output in place.
    """
    if isinstance(problem.source, DCNv3Spec):
        return _operator(problem, problem.source, threads)
    return [_encoder(problem, problem.source, threads)]


def _operator(problem: Problem, spec: DCNv3Spec, threads: int) -> list[Contestant]:
    import tvm

    operator = compile_op(spec)
    inputs = list(problem.inputs.values())
    function = operator.executable["dcnv3"]
    tensors = [tvm.runtime.tensor(array) for array in inputs]
    out = tvm.runtime.tensor(np.full(problem.reference[0].shape, np.nan, np.float32))

    def kernel() -> Any:
        library.use_threads(threads)
        function(*tensors, out)
        return out

    return [
        Contestant(OURS, lambda: operator(*inputs), lambda y: [y], problem.tolerance),
        Contestant(f"{OURS} kernel", kernel, lambda y: [y.numpy()], problem.tolerance),
    ]


def _encoder(problem: Problem, source: InternImage, threads: int) -> Contestant:
    model = _compiled(problem, source, "default")
    return Contestant(OURS, *of_ours(model, problem.inputs, threads), problem.tolerance)


def untuned(problem: Problem, threads: int) -> Session:
    """Compile the problem for this machine with the schedule rules' own decisions alone."""
    if isinstance(problem.source, DCNv3Spec):
        operator = compile_op(problem.source, database="none")
        inputs = list(problem.inputs.values())
        return Session(lambda: operator(*inputs), lambda y: [y])
    return of_ours(_compiled(problem, problem.source, "none"), problem.inputs, threads)


def _compiled(problem: Problem, source: InternImage, database: str) -> CompiledModel:
    example = tuple(problem.inputs["image"].shape)
    imported = frontend.import_model(source, example=example)
    return compile_model(imported, dtype=problem.dtype, database=database)
