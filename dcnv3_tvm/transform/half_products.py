"""Which products of a model in bfloat16 can multiply in float16, which has three bits more.

Most of a model's error in bfloat16 is the rounding of factors to 8 bits. What bfloat16 is asked for
is its range, and many products do not need it: a LayerNorm over C channels gives numbers of at most
sqrt(C)*|gamma| + |beta|, whatever it reads, and an image has a range of its own. From there bounds
go on: a product makes at most |row of W|*|x| + |bias|; GELU and its like make no number larger;
DCNv3 takes means of what it samples, by masks that add up to one. Numbers that lie far within
float16 are stored and multiplied so, at the same speed. A weight that float16 cannot hold, or has
most of its numbers below float16's smallest, is seen: it is further off in float16 than in
bfloat16. Sums are float32 in either.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Final, NamedTuple

import numpy as np
import tvm
from tvm import relax

from dcnv3_tvm.dtypes import numpy_dtype
from dcnv3_tvm.transform.find_layers import Layer
from dcnv3_tvm.transform.ir import dimensions
from dcnv3_tvm.transform.storage import packed_sampling

PRODUCTS: Final = ("matmul", "convolution")
"""Kinds of layers that multiply factors of the type of the products."""

_IMAGE: Final = 2.0**10
"""Bound that is taken for images, a model's inputs of four dimensions: pixels are 255 at most."""

_MOST: Final = 2.0**14
"""Largest bound of a factor, a quarter of the largest number of float16."""

_LEAST: Final = 2.0**-4
"""Smallest bound of a factor: below, its typical numbers would come near float16's smallest."""

_KEEPING: Final = ("relax.permute_dims", "relax.reshape", "relax.mean")
"""Operators whose results are no larger than what they read."""


class Half(NamedTuple):
    """What is float16 in a model that is compiled in bfloat16.

    Parameters
    ----------
    products : set of relax.Var
        Results of products whose factors are.
    values : set of relax.Var
        What is stored so, if no other product reads it.
    """

    products: set[relax.Var]
    values: set[relax.Var]


class _Reach(NamedTuple):
    """How large a value can be: each number, and the Euclidean norm of a pixel's channels."""

    most: float
    norm: float


_ENDLESS: Final = _Reach(math.inf, math.inf)


def half_products(
    function: relax.Function,
    layers: Mapping[relax.Var, Layer],
    inputs: int,
    weights: Mapping[relax.Var, np.ndarray],
    module: tvm.IRModule,
) -> Half:
    """Find the products that multiply in float16.

    Parameters
    ----------
    function : relax.Function
        Channels last, with weights folded; its first `inputs` parameters are no weights.
    layers : mapping of relax.Var to Layer
        What `find_layers` found in it.
    inputs : int
        Number of inputs.
    weights : mapping of relax.Var to numpy.ndarray
        Values of the other parameters.
    module : tvm.IRModule
        Holds the function and its kernels.
    """
    images = [var for var in function.params[:inputs] if var.ty.ndim == 4]
    reach = {var: _of_any(_IMAGE, var) for var in images}
    found = Half(set(), set())
    for block in function.body.blocks:
        for binding in block.bindings:
            var, value, layer = binding.var, binding.value, layers.get(binding.var)
            if layer is not None:
                reach[var] = _of_layer(layer, reach, weights)
                source, weight = layer.root.args[:2]
                fits = source in images or source in found.values
                if layer.kind in PRODUCTS and fits and _is_closer(weights.get(weight)):
                    found.products.add(var)
            elif packed_sampling(value, module) is not None:
                reach[var] = _of_any(reach.get(value.args[1].fields[0], _ENDLESS).most, var)
            elif _keeps_range(value):
                source = value.args[0] if isinstance(value, relax.Call) else value
                reach[var] = _of_any(reach.get(source, _ENDLESS).most, var)
            if _LEAST <= reach.get(var, _ENDLESS).most <= _MOST:
                found.values.add(var)
    return found


def _keeps_range(value: relax.Expr) -> bool:
    """Tell whether a value is its first argument in another order, its mean, or another name."""
    if isinstance(value, relax.Call):
        return getattr(value.op, "name", "") in _KEEPING
    return isinstance(value, relax.Var) and isinstance(value.ty, relax.TensorType)


def _of_any(most: float, var: relax.Var) -> _Reach:
    """Bound a value of which only the largest number is known."""
    last = None if var.ty.shape is None else dimensions(var)[-1]
    # The last axis of an image may be its width, which need not be known.
    return _Reach(most, math.sqrt(last) * most if isinstance(last, int) else math.inf)


def _of_layer(
    layer: Layer,
    reach: Mapping[relax.Expr, _Reach],
    weights: Mapping[relax.Var, np.ndarray],
) -> _Reach:
    """Bound a layer's result."""
    norm = layer.root if layer.kind == "layer_norm" else layer.norm
    if norm is not None:
        found = _of_norm(norm, weights)
    elif layer.kind in PRODUCTS:
        found = _of_product(layer, reach.get(layer.root.args[0], _ENDLESS), weights)
    else:
        found = _ENDLESS
    if layer.activation == "sigmoid":  # GELU, ReLU and SiLU make no number larger
        return _ENDLESS
    if layer.residual is None:
        return found
    added = reach.get(layer.residual, _ENDLESS)
    return _Reach(found.most + added.most, found.norm + added.norm)


def _of_norm(norm: relax.Call, weights: Mapping[relax.Var, np.ndarray]) -> _Reach:
    gamma, beta = (weights.get(parameter) for parameter in norm.args[1:])
    if gamma is None or beta is None:
        return _ENDLESS
    scaled = math.sqrt(gamma.size) * float(np.abs(gamma).max())
    return _Reach(scaled + float(np.abs(beta).max()), scaled + float(np.linalg.norm(beta)))


def _of_product(layer: Layer, source: _Reach, weights: Mapping[relax.Var, np.ndarray]) -> _Reach:
    weight = weights.get(layer.root.args[1])
    if weight is None:
        return _ENDLESS
    # (inputs, outputs), or (outputs, height, width, inputs).
    matrix = weight.T if weight.ndim == 2 else weight.reshape(weight.shape[0], -1)
    rows = np.linalg.norm(matrix, axis=1)
    pixels = math.prod(weight.shape[1:-1]) if weight.ndim == 4 else 1
    bias = np.zeros(1) if layer.bias is None else weights.get(layer.bias, np.full(1, np.inf))
    given = math.sqrt(pixels) * source.norm
    return _Reach(
        float((rows * given + np.abs(bias)).max()),
        float(np.linalg.norm(rows) * given + np.linalg.norm(bias)),
    )


def _is_closer(weight: np.ndarray | None) -> bool:
    """Tell whether a weight is rounded less in float16 than in bfloat16."""
    if weight is None:
        return False

    def error(dtype: str) -> float:
        with np.errstate(over="ignore"):
            rounded = weight.astype(numpy_dtype(dtype)).astype(np.float32)
        return float(np.linalg.norm(rounded - weight))

    return error("float16") <= error("bfloat16")
