"""Models ready to be called again and again, in the way of each runtime.

PyTorch is imported only where a PyTorch module is run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from dcnv3_tvm.bench.problems import Array
    from dcnv3_tvm.runtime import CompiledModel


class Session(NamedTuple):
    """A model with its inputs in place.

    Parameters
    ----------
    call : callable
        Computes once.
    outputs : callable
        Turns what `call` returned into arrays.
    """

    call: Callable[[], Any]
    outputs: Callable[[Any], list[Array]]


def of_ours(model: CompiledModel, inputs: Mapping[str, Array], threads: int) -> Session:
    """Call a model of this library."""
    model.threads = threads
    given = list(inputs.values())

    def listed(result: Any) -> list[Array]:
        return list(result.values()) if isinstance(result, dict) else [result]

    return Session(lambda: model(*given), listed)


def of_torch(module: Callable[..., Any], inputs: Mapping[str, Array], threads: int) -> Session:
    """Call a PyTorch module, compiled or not, without gradients."""
    import torch

    torch.set_num_threads(threads)
    tensors = [torch.from_numpy(array) for array in inputs.values()]

    def call() -> Any:
        with torch.no_grad():
            return module(*tensors)

    def listed(result: Any) -> list[Array]:
        found = [result] if isinstance(result, torch.Tensor) else result
        return [np.ascontiguousarray(tensor.detach().numpy()) for tensor in found]

    return Session(call, listed)


def of_onnxruntime(path: Path, inputs: Mapping[str, Array], threads: int) -> Session:
    """Open a file with ONNX Runtime's CPU provider, with its default optimisations: all."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    feed = dict(inputs)
    return Session(lambda: session.run(None, feed), list)


def of_openvino(path: Path, inputs: Mapping[str, Array], threads: int, precision: str) -> Session:
    """Open a file with OpenVINO's CPU plugin, for latency.

    The precision is named, ``f32`` or ``bf16``, because by itself it takes bfloat16 where it can.
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

    return Session(call, lambda result: [np.array(result[port]) for port in model.outputs])
