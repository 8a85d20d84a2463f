"""The peers, run as their users run them: from the PyTorch module with ``grid_sample``."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from dcnv3_tvm.bench.contestants import Contestant
from dcnv3_tvm.bench.export import OnnxFile
from dcnv3_tvm.bench.problems import PEER_TOLERANCE, Problem, arrays


def eager(problem: Problem, threads: int) -> Contestant:
    """PyTorch without a compiler."""
    return _torch("torch", problem.module, problem, threads)


def compiled(problem: Problem, threads: int) -> Contestant:
    """``torch.compile`` with its defaults."""
    torch.compiler.reset()
    return _torch("compile", torch.compile(problem.module), problem, threads)


def _torch(name: str, module: Any, problem: Problem, threads: int) -> Contestant:
    tensors = problem.tensors

    def call() -> Any:
        with torch.no_grad():
            return module(*tensors)

    torch.set_num_threads(threads)
    return Contestant(name, call, arrays, PEER_TOLERANCE)


def onnxruntime(problem: Problem, threads: int) -> Contestant:
    """ONNX Runtime's CPU provider, with its default optimisations: all."""
    return _onnxruntime("onnxruntime", problem.onnx, problem, threads)


def onnxruntime_deform(problem: Problem, threads: int) -> Contestant:
    """ONNX Runtime, for a model that was rewritten to use DeformConv."""
    from dcnv3_tvm.bench.deform_conv import deforming, translations

    file = OnnxFile(deforming(problem.module), problem.inputs, translations())
    return _onnxruntime("onnxruntime-deform", file, problem, threads)


def _onnxruntime(name: str, file: OnnxFile, problem: Problem, threads: int) -> Contestant:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    session = ort.InferenceSession(str(file.path), options, providers=["CPUExecutionProvider"])
    feed = problem.inputs
    return Contestant(name, lambda: session.run(None, feed), list, PEER_TOLERANCE)


def openvino(problem: Problem, threads: int) -> Contestant:
    """OpenVINO's CPU plugin for latency, in float32: by itself it takes bfloat16 where it can."""
    import openvino as ov

    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": threads,
        "INFERENCE_PRECISION_HINT": "f32",
    }
    model = ov.Core().compile_model(str(problem.onnx.path), "CPU", settings)
    request = model.create_infer_request()
    feed = list(problem.inputs.values())

    def call() -> Any:
        return request.infer(feed, share_inputs=True, share_outputs=True)

    def outputs(result: Any) -> list[Any]:
        return [np.array(result[port]) for port in model.outputs]

    return Contestant("openvino", call, outputs, PEER_TOLERANCE)
