"""Builders of the backends of a problem on the CPU: this library, and its peers."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
import tvm

from dcnv3_tvm import frontend
from dcnv3_tvm.bench.backends import COMPILE, OURS, UNTUNED, Backend, Peer
from dcnv3_tvm.bench.problems import Problem
from dcnv3_tvm.bench.runners import BackendRunner, compiled_model_runner, onnx_runner
from dcnv3_tvm.compiler.compile import compile_model
from dcnv3_tvm.compiler.operator import CompiledOperator, compile_op
from dcnv3_tvm.frontend.models.internimage import InternImage
from dcnv3_tvm.runtime import library
from dcnv3_tvm.spec import DCNv3Spec


def builders(
    problem: Problem, peers: Iterable[Peer], threads: int
) -> dict[str, Callable[[], Backend]]:
    """Return what prepares this library's backends and the peers for a problem, by name.

    This library is the call as users make it; for an operator without gradients also its kernel
    alone, without argument checks and with a preallocated output.
    """
    runners: dict[str, Callable[[], BackendRunner]] = {}
    if problem.own_modules:
        for name, module in problem.own_modules.items():
            runners[name] = functools.partial(problem.run_module, module, problem.inputs, threads)
    elif isinstance(problem.source, DCNv3Spec):
        spec = problem.source
        runners[OURS] = lambda: _operator_runner(compile_op(spec), problem)
        runners[f"{OURS} kernel"] = lambda: _kernel_runner(compile_op(spec), problem, threads)
    else:
        encoder = problem.source
        runners[OURS] = lambda: _encoder_runner(encoder, problem, threads, "default")
    made: dict[str, Callable[[], Backend]] = {}
    for name, build in runners.items():
        made[name] = functools.partial(_our_backend, build, problem.tolerance)
    for peer in peers:
        made[peer.name] = functools.partial(build_peer, peer, problem, threads)
    return made


def build_peer(peer: Peer, problem: Problem, threads: int) -> Backend:
    """Prepare a peer for a problem."""
    return Backend(_peer_runner(peer, problem, threads), peer.tolerance)


def _our_backend(build: Callable[[], BackendRunner], tolerance: float) -> Backend:
    return Backend(build(), tolerance)


def _operator_runner(operator: CompiledOperator, problem: Problem) -> BackendRunner:
    inputs = list(problem.inputs.values())
    return BackendRunner(lambda: operator(*inputs), lambda y: [y])


def _kernel_runner(operator: CompiledOperator, problem: Problem, threads: int) -> BackendRunner:
    function = operator.kernel.library[operator.kernel.name]
    tensors = [tvm.runtime.tensor(array) for array in problem.inputs.values()]
    out = tvm.runtime.tensor(np.full(problem.reference[0].shape, np.nan, np.float32))

    def call() -> tvm.runtime.Tensor:
        library.use_threads(threads)
        function(*tensors, out)
        return out

    return BackendRunner(call, lambda y: [y.numpy()])


def _encoder_runner(
    encoder: InternImage, problem: Problem, threads: int, database: str
) -> BackendRunner:
    example = tuple(problem.inputs["image"].shape)
    imported = frontend.import_model(encoder, example=example)
    model = compile_model(imported, dtype=problem.dtype, database=database)
    return compiled_model_runner(model, problem.inputs, threads)


def _peer_runner(peer: Peer, problem: Problem, threads: int) -> BackendRunner:
    if peer.name == UNTUNED:
        if isinstance(problem.source, DCNv3Spec):
            return _operator_runner(compile_op(problem.source, database="none"), problem)
        return _encoder_runner(problem.source, problem, threads, "none")
    if peer.form is not None:
        return onnx_runner(peer.name, problem.onnx(peer.form), problem.inputs, threads)
    module: Callable[..., Any] = problem.module
    if peer.name == COMPILE:
        torch.compiler.reset()
        module = torch.compile(module)
    return problem.run_module(module, problem.inputs, threads)
