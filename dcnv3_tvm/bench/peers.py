"""The peers, run as their users run them: from the PyTorch module with ``grid_sample``."""

from __future__ import annotations

import torch

from dcnv3_tvm.bench.problems import Problem
from dcnv3_tvm.bench.sessions import Session, of_onnxruntime, of_openvino, of_torch


def eager(problem: Problem, threads: int) -> Session:
    """PyTorch without a compiler."""
    return of_torch(problem.module, problem.inputs, threads)


def compiled(problem: Problem, threads: int) -> Session:
    """``torch.compile`` with its defaults."""
    torch.compiler.reset()
    return of_torch(torch.compile(problem.module), problem.inputs, threads)


def onnxruntime(problem: Problem, threads: int) -> Session:
    """ONNX Runtime, for a model that was exported as it is."""
    return of_onnxruntime(problem.onnx.path, problem.inputs, threads)


def onnxruntime_deform(problem: Problem, threads: int) -> Session:
    """ONNX Runtime, for a model that was rewritten to use DeformConv."""
    return of_onnxruntime(problem.onnx_deform.path, problem.inputs, threads)


def openvino(problem: Problem, threads: int) -> Session:
    """OpenVINO in float32."""
    return of_openvino(problem.onnx.path, problem.inputs, threads, "f32")


def openvino_bf16(problem: Problem, threads: int) -> Session:
    """OpenVINO in bfloat16."""
    return of_openvino(problem.onnx.path, problem.inputs, threads, "bf16")
