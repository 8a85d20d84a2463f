"""Builders of this library's backends, with and without tuning records."""

from __future__ import annotations

from typing import Any

import numpy as np

from dcnv3_tvm import frontend
from dcnv3_tvm.bench.backends import OURS, Backend
from dcnv3_tvm.bench.problems import Problem
from dcnv3_tvm.bench.runners import BackendRunner, compiled_model_runner
from dcnv3_tvm.compiler.compile import compile_model
from dcnv3_tvm.compiler.operator import compile_op
from dcnv3_tvm.frontend.models.internimage import InternImage
from dcnv3_tvm.runtime import CompiledModel, library
from dcnv3_tvm.spec import DCNv3Spec


def build_ours(problem: Problem, threads: int) -> list[Backend]:
    """Compile a problem for this machine.

    Returns
    -------
    list of Backend
        The call as users make it; for an operator without gradients also its kernel alone, without
        argument checks and with a preallocated output.
    """
    if problem.own_modules:
        return [
            Backend.of(name, problem.run_module(module, problem.inputs, threads), problem.tolerance)
            for name, module in problem.own_modules.items()
        ]
    if isinstance(problem.source, DCNv3Spec):
        return _operator_backends(problem, problem.source, threads)
    model = _compiled_encoder(problem, problem.source, "default")
    runner = compiled_model_runner(model, problem.inputs, threads)
    return [Backend.of(OURS, runner, problem.tolerance)]


def _operator_backends(problem: Problem, spec: DCNv3Spec, threads: int) -> list[Backend]:
    import tvm

    operator = compile_op(spec)
    inputs = list(problem.inputs.values())
    function = operator.kernel.library[operator.kernel.name]
    tensors = [tvm.runtime.tensor(array) for array in inputs]
    out = tvm.runtime.tensor(np.full(problem.reference[0].shape, np.nan, np.float32))

    def kernel() -> Any:
        library.use_threads(threads)
        function(*tensors, out)
        return out

    return [
        Backend(OURS, lambda: operator(*inputs), lambda y: [y], problem.tolerance),
        Backend(f"{OURS} kernel", kernel, lambda y: [y.numpy()], problem.tolerance),
    ]


def untuned(problem: Problem, threads: int) -> BackendRunner:
    """Compile a problem for this machine with the default decisions of the schedule rules."""
    if isinstance(problem.source, DCNv3Spec):
        operator = compile_op(problem.source, database="none")
        inputs = list(problem.inputs.values())
        return BackendRunner(lambda: operator(*inputs), lambda y: [y])
    model = _compiled_encoder(problem, problem.source, "none")
    return compiled_model_runner(model, problem.inputs, threads)


def _compiled_encoder(problem: Problem, source: InternImage, database: str) -> CompiledModel:
    example = tuple(problem.inputs["image"].shape)
    imported = frontend.import_model(source, example=example)
    return compile_model(imported, dtype=problem.dtype, database=database)
