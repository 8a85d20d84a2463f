"""The peers, run as their users run them: from the PyTorch module with ``grid_sample``."""

from __future__ import annotations

import torch

from dcnv3_tvm.bench import sessions
from dcnv3_tvm.bench.contestants import Contestant
from dcnv3_tvm.bench.problems import BF16_PEER_TOLERANCE, PEER_TOLERANCE, Problem


def eager(problem: Problem, threads: int) -> Contestant:
    """PyTorch without a compiler."""
    session = sessions.of_torch(problem.module, problem.inputs, threads)
    return Contestant("torch", *session, PEER_TOLERANCE)


def compiled(problem: Problem, threads: int) -> Contestant:
    """``torch.compile`` with its defaults."""
    torch.compiler.reset()
    session = sessions.of_torch(torch.compile(problem.module), problem.inputs, threads)
    return Contestant("compile", *session, PEER_TOLERANCE)


def onnxruntime(problem: Problem, threads: int) -> Contestant:
    """ONNX Runtime, for a model that was exported as it is."""
    session = sessions.of_onnxruntime(problem.onnx.path, problem.inputs, threads)
    return Contestant("onnxruntime", *session, PEER_TOLERANCE)


def onnxruntime_deform(problem: Problem, threads: int) -> Contestant:
    """ONNX Runtime, for a model that was rewritten to use DeformConv."""
    session = sessions.of_onnxruntime(problem.onnx_deform.path, problem.inputs, threads)
    return Contestant("onnxruntime-deform", *session, PEER_TOLERANCE)


def openvino(problem: Problem, threads: int) -> Contestant:
    """OpenVINO in float32."""
    session = sessions.of_openvino(problem.onnx.path, problem.inputs, threads, "f32")
    return Contestant("openvino", *session, PEER_TOLERANCE)


def openvino_bf16(problem: Problem, threads: int) -> Contestant:
    """OpenVINO in bfloat16."""
    session = sessions.of_openvino(problem.onnx.path, problem.inputs, threads, "bf16")
    return Contestant("openvino-bf16", *session, BF16_PEER_TOLERANCE)
