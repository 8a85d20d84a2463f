"""Run a model repeatedly with each runtime. PyTorch is imported only to run PyTorch modules."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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
        Converts what `call` returned to arrays or tensors; not timed.
    peak_bytes : int, optional
        Peak memory of the GPU, or of a process that runs it.
    """

    call: Callable[[], Any]
    outputs: Callable[[Any], list[Any]]
    peak_bytes: int | None = None


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
        return _arrays([result] if isinstance(result, torch.Tensor) else result)

    return BackendRunner(call, outputs)


def gradient_runner(
    module: Callable[..., Any], inputs: Mapping[str, Array], threads: int
) -> BackendRunner:
    """Run a PyTorch module and its gradients by all inputs but the last, its result's gradient."""
    import torch

    torch.set_num_threads(threads)
    *arguments, grad = [torch.from_numpy(array) for array in inputs.values()]
    for argument in arguments:
        argument.requires_grad_()

    def call() -> list[Any]:
        result = module(*arguments)
        return [result, *torch.autograd.grad(result, arguments, grad)]

    return BackendRunner(call, _arrays)


def training_runner(
    module: Any, inputs: Mapping[str, Array], threads: int, dtype: str
) -> BackendRunner:
    """Run training steps of a PyTorch classifier: its loss, gradients, and a step of AdamW.

    Parameters
    ----------
    module : torch.nn.Module
        The classifier, whose weights the steps change.
    inputs : mapping of str to numpy.ndarray
        Images and their labels.
    threads : int
        Threads that compute.
    dtype : str
        ``"float32"``, or a dtype for autocast.
    """
    import torch

    torch.set_num_threads(threads)
    image, label = (torch.from_numpy(array) for array in inputs.values())
    optimizer = torch.optim.AdamW(module.parameters())
    cast = torch.autocast("cpu", getattr(torch, dtype), enabled=dtype != "float32")

    def call() -> Any:
        optimizer.zero_grad()
        with cast:
            loss = torch.nn.functional.cross_entropy(module(image), label)
        torch.autograd.backward(loss)
        optimizer.step()
        return loss

    def outputs(loss: Any) -> list[Array]:
        grads = [parameter.grad.flatten() for parameter in module.parameters()]
        return _arrays([loss[None], torch.cat(grads)[None]])

    return BackendRunner(call, outputs)


def _arrays(tensors: Sequence[Any]) -> list[Array]:
    return [np.ascontiguousarray(tensor.detach().numpy()) for tensor in tensors]


def onnx_runner(
    backend: str, path: Path, inputs: Mapping[str, Array], threads: int
) -> BackendRunner:
    """Run an ONNX file with the peer of this name, optimised for latency."""
    if backend.startswith("openvino"):
        # OpenVINO's own default is bfloat16 where the processor has it.
        precision = "bf16" if backend.endswith("bf16") else "f32"
        return _openvino_runner(path, inputs, threads, precision)
    return _onnxruntime_runner(path, inputs, threads)


def _onnxruntime_runner(path: Path, inputs: Mapping[str, Array], threads: int) -> BackendRunner:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    feed = dict(inputs)
    return BackendRunner(lambda: session.run(None, feed), list)


def _openvino_runner(
    path: Path, inputs: Mapping[str, Array], threads: int, precision: str
) -> BackendRunner:
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
