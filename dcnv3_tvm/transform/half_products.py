"""Which products of a model in bfloat16 can multiply in float16, which has three bits more.

Most of a model's error in bfloat16 is the rounding of factors to 8 bits. What bfloat16 is asked for
is its range, and many products do not need it: a LayerNorm over C channels gives numbers of at most
sqrt(C)*|gamma| + |beta|, whatever it reads; GELU and its like make no number larger; an image has a
range of its own. Such numbers lie far within float16, and a weight that does not, or has most of
its numbers below float16's smallest, is seen: it is further off in float16 than in bfloat16. So
these products take both factors in float16, at the same speed. Sums are float32 in either.

What follows a product without a norm between, the hidden layer of an MLP and what DCNv3 samples,
has no such bound and stays in bfloat16.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Final

import numpy as np
from tvm import relax

from dcnv3_tvm.op.tensors import numpy_dtype
from dcnv3_tvm.transform.find_layers import Layer
from dcnv3_tvm.transform.shapes import dimensions

PRODUCTS: Final = ("linear", "convolution")
"""Kinds of layers that multiply factors of the type of the products."""

_IMAGE: Final = 2.0**10
"""Bound that is taken for images, a model's inputs of four dimensions: pixels are 255 at most."""

_MOST: Final = 2.0**14
"""Largest bound of a factor, a quarter of the largest number of float16."""

_LEAST: Final = 2.0**-4
"""Smallest bound of a factor: below, its typical numbers would come near float16's smallest."""


def half_products(
    function: relax.Function,
    layers: Mapping[relax.Var, Layer],
    inputs: int,
    weights: Mapping[relax.Var, np.ndarray],
) -> set[relax.Var]:
    """Find the products that multiply in float16, by the variables that hold their results.

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
    """
    images = [var for var in function.params[:inputs] if var.ty.ndim == 4]
    bounds = dict.fromkeys(images, _IMAGE)
    found: set[relax.Var] = set()
    for block in function.body.blocks:
        for binding in block.bindings:
            var, value, layer = binding.var, binding.value, layers.get(binding.var)
            if layer is None:
                if _moves(value):
                    source = value.args[0] if isinstance(value, relax.Call) else value
                    bounds[var] = bounds.get(source, math.inf)
                continue
            bounds[var] = _bound(layer, bounds, weights)
            source, weight = layer.root.args[:2]
            fits = _LEAST <= bounds.get(source, math.inf) <= _MOST
            if layer.kind in PRODUCTS and fits and _is_closer(weights.get(weight)):
                found.add(var)
    return found


def _moves(value: relax.Expr) -> bool:
    """Tell whether a value is its first argument in another order, or under another name."""
    if isinstance(value, relax.Call):
        return getattr(value.op, "name", "") in ("relax.permute_dims", "relax.reshape")
    return isinstance(value, relax.Var)


def _bound(
    layer: Layer,
    bounds: Mapping[relax.Expr, float],
    weights: Mapping[relax.Var, np.ndarray],
) -> float:
    """Bound the absolute values of a layer's result."""
    norm = layer.root if layer.kind == "layer_norm" else layer.norm
    if norm is None:
        return math.inf
    gamma, beta = (weights.get(parameter) for parameter in norm.args[1:])
    if gamma is None or beta is None:
        return math.inf
    channels = dimensions(norm.args[0])[-1]
    # GELU, ReLU and SiLU make no number larger, and a sigmoid is at most 1.
    bound = math.sqrt(channels) * float(np.abs(gamma).max()) + float(np.abs(beta).max())
    return bound + (0.0 if layer.residual is None else bounds.get(layer.residual, math.inf))


def _is_closer(weight: np.ndarray | None) -> bool:
    """Tell whether a weight is rounded less in float16 than in bfloat16."""
    if weight is None:
        return False

    def error(dtype: str) -> float:
        with np.errstate(over="ignore"):
            rounded = weight.astype(numpy_dtype(dtype)).astype(np.float32)
        return float(np.linalg.norm(rounded - weight))

    return error("float16") <= error("bfloat16")
