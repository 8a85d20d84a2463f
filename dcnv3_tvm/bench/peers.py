"""Builders of the peers, which run the PyTorch reference implementation with ``grid_sample``."""

from __future__ import annotations

import torch

from dcnv3_tvm.bench.problems import Problem
from dcnv3_tvm.bench.runners import (
    BackendRunner,
    onnxruntime_runner,
    openvino_runner,
)


def eager(problem: Problem, threads: int) -> BackendRunner:
    """Build PyTorch eager."""
    return problem.run_module(problem.module, problem.inputs, threads)


def compiled(problem: Problem, threads: int) -> BackendRunner:
    """Build ``torch.compile`` with its defaults."""
    torch.compiler.reset()
    return problem.run_module(torch.compile(problem.module), problem.inputs, threads)


def onnxruntime(problem: Problem, threads: int) -> BackendRunner:
    """Build ONNX Runtime on the module exported with GridSample."""
    return onnxruntime_runner(problem.onnx.path, problem.inputs, threads)


def onnxruntime_deform(problem: Problem, threads: int) -> BackendRunner:
    """Build ONNX Runtime on the module exported with DeformConv."""
    return onnxruntime_runner(problem.onnx_deform.path, problem.inputs, threads)


def openvino(problem: Problem, threads: int) -> BackendRunner:
    """Build OpenVINO in float32."""
    return openvino_runner(problem.onnx.path, problem.inputs, threads, "f32")


def openvino_bf16(problem: Problem, threads: int) -> BackendRunner:
    """Build OpenVINO in bfloat16."""
    return openvino_runner(problem.onnx.path, problem.inputs, threads, "bf16")
