"""Float64 references of the encoder's layers, and running kernels on arrays."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from dcnv3_tvm.kernels.epilogue import Epilogue
from helpers.guarded import GuardedOutput

Array = npt.NDArray[Any]
Float64Array = npt.NDArray[np.float64]

_ERF: Final = np.vectorize(math.erf, otypes=[np.float64])


def activation(name: str | None, x: Array) -> Float64Array:
    """Apply a function of `dcnv3_tvm.kernels.activations` in float64."""
    x = x.astype(np.float64)
    if name == "gelu":
        return np.asarray(x * 0.5 * (1.0 + _ERF(x / math.sqrt(2.0))))
    if name == "relu":
        return np.maximum(x, 0.0)
    if name in ("sigmoid", "silu"):
        sigmoid = 1.0 / (1.0 + np.exp(-x))
        return np.asarray(x * sigmoid if name == "silu" else sigmoid)
    return x


def finish(
    epilogue: Epilogue, x: Array, bias: Array | None = None, residual: Array | None = None
) -> Float64Array:
    """Apply an epilogue in float64; `bias` and `residual` are ignored if it does not use them."""
    x = x.astype(np.float64)
    if epilogue.bias and bias is not None:
        x = x + bias
    x = activation(epilogue.activation, x)
    return x + residual if epilogue.residual and residual is not None else x


def convolution(
    x: Array, weight: Array, *, stride: tuple[int, int], pad: tuple[int, int]
) -> Float64Array:
    """Convolve (N, H, W, C) with (O, C, kh, kw), zero-padded, to (N, Ho, Wo, O), in float64."""
    windows = _windows(x, weight.shape[2:], stride, pad)
    return np.asarray(np.einsum("nhwcpq,ocpq->nhwo", windows, weight.astype(np.float64)))


def depthwise(
    x: Array, weight: Array, *, stride: tuple[int, int], pad: tuple[int, int]
) -> Float64Array:
    """Convolve (N, H, W, C) with (kh, kw, C) depthwise, zero-padded, in float64."""
    windows = _windows(x, weight.shape[:2], stride, pad)
    return np.asarray(np.einsum("nhwcpq,pqc->nhwc", windows, weight.astype(np.float64)))


def layer_norm(x: Array, gamma: Array, beta: Array, eps: float) -> Float64Array:
    """Normalise the last axis in float64, with the biased variance."""
    x = x.astype(np.float64)
    centred = x - x.mean(axis=-1, keepdims=True)
    variance = (centred**2).mean(axis=-1, keepdims=True)
    return np.asarray(centred / np.sqrt(variance + eps) * gamma + beta)


def _windows(
    x: Array, kernel: Sequence[int], stride: tuple[int, int], pad: tuple[int, int]
) -> Float64Array:
    """Return a view of x as windows of shape (N, Ho, Wo, C, kh, kw)."""
    framed = np.pad(x.astype(np.float64), [(0, 0), *((p, p) for p in pad), (0, 0)])
    windows = np.lib.stride_tricks.sliding_window_view(framed, tuple(kernel), axis=(1, 2))
    return windows[:, :: stride[0], :: stride[1]]


def run_kernel(
    func: Any,
    inputs: Sequence[Array],
    output_shape: Sequence[int],
    *,
    target: Any = None,
    scheduled: bool = True,
    dtype: str | None = None,
) -> Array:
    """Compile a kernel, run it on arrays, and return its output.

    Parameters
    ----------
    func : tvm.tirx.PrimFunc
        Kernel whose last parameter is its output.
    inputs : sequence of ndarray
        The other parameters.
    output_shape : sequence of int
        Shape of the output, see `helpers.guarded.GuardedOutput`.
    target : tvm.target.Target, optional
        Target to compile for; this machine's CPU by default.
    scheduled : bool
        Whether to apply the schedule rules.
    dtype : str, optional
        Dtype of the output; that of the first input by default.

    Returns
    -------
    ndarray
        The output.
    """
    import tvm

    from dcnv3_tvm import machine
    from dcnv3_tvm.schedules import schedule_module
    from dcnv3_tvm.targets import resolve_target

    machine.enable_amx()
    target = resolve_target() if target is None else target
    module = tvm.IRModule({"main": func.with_attr("global_symbol", "main")})
    if scheduled:
        module, _ = schedule_module(module, target)
    compiled = tvm.compile(module, target=target)
    out = GuardedOutput(output_shape, str(inputs[0].dtype) if dtype is None else dtype)
    compiled["main"](*(tvm.runtime.tensor(array) for array in inputs), out.argument)
    return out.checked()
