"""Compare a sampling function of the user's with the reference implementation of DCNv3."""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final, TypeVar

import numpy as np
import torch
from torch import Tensor

from dcnv3_tvm.frontend.torch.published_call import PublishedCall
from dcnv3_tvm.op.reference import dcnv3_reference
from dcnv3_tvm.spec import DCNv3Spec

TOLERANCE: Final = 1e-4
"""Largest accepted max abs error relative to max|reference|."""

_EXACT_SIZE: Final = 256
"""Largest image with that tolerance.

The published function computes its grid in float32 for all types, relative to the size of the
image: its error is 1.2e-5 for 334 pixels and 7.3e-5 for 1333.
"""

_MOST_ELEMENTS: Final = 2**16
"""Most values of an image that is compared as a whole."""

_DYNAMIC_FACTOR: Final = 4
"""Length of the strips for a dynamic size, relative to the example."""

_SHORT: Final = 4
"""Pixels along the short side of a strip."""

Sampling = Callable[[Tensor, Tensor, Tensor], Any]
ResultT = TypeVar("ResultT")


def sampling_error(sample: Sampling, call: PublishedCall) -> float:
    """Return the max abs error of `sample` relative to max|reference|.

    The image has the size of that of the call, because offsets may be limited or scaled by the
    size; for a large one, it is replaced by a strip of its height and one of its width. Dynamic
    sizes are compared in larger strips as well. Offsets reach from one side of the image to the
    other and beyond it.

    Parameters
    ----------
    sample : callable
        Maps x, offset and mask to the result, with the other arguments of the call.
    call : PublishedCall
        The call whose parameters and sizes are used.
    """
    height, width = call.size
    is_large = height * width * call.x.shape[-1] > _MOST_ELEMENTS
    sizes = [] if is_large else [(height, width)]
    if is_large or call.is_dynamic:
        params = call.params
        extents = zip(params.dilation, params.kernel_size, params.pad, strict=True)
        windows = (d * (kernel - 1) + 1 - 2 * pad for d, kernel, pad in extents)
        short_height, short_width = (max(_SHORT, window) for window in windows)
        factor = _DYNAMIC_FACTOR if call.is_dynamic else 1
        sizes += [(factor * height, short_width), (short_height, factor * width)]
    generator = np.random.default_rng(0)
    return max(_error(sample, call.spec(1, *size), generator) for size in sizes)


def tolerance(call: PublishedCall) -> float:
    """Return the largest accepted `sampling_error` of a call."""
    longest = max(call.size) * (_DYNAMIC_FACTOR if call.is_dynamic else 1)
    return TOLERANCE * max(1.0, longest / _EXACT_SIZE)


def outside_of_tracing(function: Callable[[], ResultT]) -> ResultT:
    """Call a function in another thread, which the modes of ``torch.export`` do not affect."""
    with ThreadPoolExecutor(max_workers=1) as pool:
        return pool.submit(function).result()


def relative_error(got: Any, expected: np.ndarray[Any, Any]) -> float:
    """Return the max abs error relative to max|expected|; infinite for another shape or NaN."""
    if not isinstance(got, Tensor) or got.shape != expected.shape:
        return float("inf")
    result = got.detach().double().numpy()
    error = float(np.abs(result - expected).max() / np.abs(expected).max())
    return error if math.isfinite(error) else float("inf")


def _error(sample: Sampling, spec: DCNv3Spec, generator: np.random.Generator) -> float:
    x_shape, offset_shape, mask_shape = (
        [int(size or 0) for size in shape]
        for shape in (spec.input_shape, spec.offset_shape, spec.mask_shape)
    )
    x = generator.standard_normal(x_shape)
    mask = generator.uniform(-0.5, 1.5, mask_shape)
    reach = np.array([x_shape[2], x_shape[1]]) + 1.0
    offset = (generator.uniform(-1.0, 1.0, (*mask_shape, 2)) * reach).reshape(offset_shape)
    tensors = [torch.from_numpy(array) for array in (x, offset, mask)]
    try:
        results = _sample_twice(sample, tensors)
    except Exception:  # raised by code that is written for float32 only
        tensors = [tensor.float() for tensor in tensors]
        results = _sample_twice(sample, tensors)
    x, offset, mask = (tensor.double().numpy() for tensor in tensors)
    expected = dcnv3_reference(x, offset, mask, spec)
    return max(relative_error(got, expected) for got in results)


def _sample_twice(sample: Sampling, tensors: list[Tensor]) -> list[Any]:
    """Return the results of two calls, which differ if the function keeps state or is random."""
    copies = [tensor.clone() for tensor in tensors]
    with torch.no_grad():
        results = [sample(*copies), sample(*copies)]
    # The operator does not write to its inputs.
    unchanged = all(map(torch.equal, copies, tensors))
    return results if unchanged else [None]
