"""Run a model repeatedly with each runtime. PyTorch is imported only to run PyTorch modules."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from dcnv3_tvm.runtime import CompiledModel

Array = np.ndarray[Any, np.dtype[Any]]


class BackendRunner(NamedTuple):
    """A model with its inputs in place.

    Parameters
    ----------
    call : callable
        Computes once.
    outputs : callable
        Converts what `call` returned to arrays.
    """

    call: Callable[[], Any]
    outputs: Callable[[Any], list[Array]]


def compiled_model_runner(
    model: CompiledModel, inputs: Mapping[str, Array], threads: int
) -> BackendRunner:
    """Run a model compiled by this library."""
    model.threads = threads
    arguments = list(inputs.values())

    def outputs(result: Any) -> list[Array]:
        return list(result.values()) if isinstance(result, dict) else [result]

    return BackendRunner(lambda: model(*arguments), outputs)


def torch_runner(
    module: Callable[..., Any], inputs: Mapping[str, Array], threads: int
) -> BackendRunner:
    """Run a PyTorch module, eager or compiled, without gradients."""
    import torch

    torch.set_num_threads(threads)
    tensors = [torch.from_numpy(array) for array in inputs.values()]

    def call() -> Any:
        with torch.no_grad():
            return module(*tensors)

    def outputs(result: Any) -> list[Array]:
        found = [result] if isinstance(result, torch.Tensor) else result
        return [np.ascontiguousarray(tensor.detach().numpy()) for tensor in found]

    return BackendRunner(call, outputs)


def onnxruntime_runner(path: Path, inputs: Mapping[str, Array], threads: int) -> BackendRunner:
    """Run an ONNX file with ONNX Runtime's CPU provider and its default optimisations."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    feed = dict(inputs)
    return BackendRunner(lambda: session.run(None, feed), list)


def openvino_runner(
    path: Path, inputs: Mapping[str, Array], threads: int, precision: str
) -> BackendRunner:
    """Run an ONNX file with OpenVINO's CPU plugin, optimised for latency.

    `precision` is ``"f32"`` or ``"bf16"``; OpenVINO's default is bfloat16 where supported.
    """
    import openvino as ov

    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": threads,
        "INFERENCE_PRECISION_HINT": precision,
    }
    model = ov.Core().compile_model(str(path), "CPU", settings)
    request = model.create_infer_request()
    feed = list(inputs.values())

    def call() -> Any:
        return request.infer(feed, share_inputs=True, share_outputs=True)

    return BackendRunner(call, lambda result: [np.array(result[port]) for port in model.outputs])
