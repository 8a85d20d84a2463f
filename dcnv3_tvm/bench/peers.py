"""The peers, run as their users run them: from the PyTorch module with ``grid_sample``."""

from __future__ import annotations

import contextlib
import io
import logging
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from dcnv3_tvm.bench.contestants import Contestant
from dcnv3_tvm.bench.problems import PEER_TOLERANCE, Problem, arrays

OPSET: Final = 20
"""ONNX operator set of the export; GridSample is in it since 16."""


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
    """ONNX Runtime's CPU provider, all graph optimisations on."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    with _exported(problem) as path:
        session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return Contestant(
        "onnxruntime", lambda: session.run(None, problem.inputs), list, PEER_TOLERANCE
    )


def openvino(problem: Problem, threads: int) -> Contestant:
    """OpenVINO's CPU plugin for latency, in float32: by itself it takes bfloat16 where it can."""
    import openvino as ov

    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": threads,
        "INFERENCE_PRECISION_HINT": "f32",
    }
    with _exported(problem) as path:
        compiled_model = ov.Core().compile_model(str(path), "CPU", settings)
    request = compiled_model.create_infer_request()
    feed = list(problem.inputs.values())

    def call() -> Any:
        return request.infer(feed, share_inputs=True, share_outputs=True)

    def outputs(result: Any) -> list[Any]:
        return [np.array(result[port]) for port in compiled_model.outputs]

    return Contestant("openvino", call, outputs, PEER_TOLERANCE)


@contextlib.contextmanager
def _exported(problem: Problem) -> Iterator[Path]:
    """Export the module to a file that lives as long as the context."""
    with tempfile.TemporaryDirectory(prefix="dcnv3-tvm-bench-") as folder:
        path = Path(folder) / "model.onnx"
        with _quiet():
            program = torch.onnx.export(
                problem.module,
                problem.tensors,
                input_names=list(problem.inputs),
                opset_version=OPSET,
                dynamo=True,
                verbose=False,
            )
            if program is None:
                raise RuntimeError("the export gave no program")
            # Beside the file, weights may be larger than the 2 GB a file can hold.
            program.save(path, external_data=True)
        yield path


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's notes about packages it does not need from the terminal."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
