"""Which values a model compiled for a GPU stores in float32.

Kernels store their results in the element type of the model, except

- results of the model, which are float32;
- residual streams of many sums, which would lose digits;
- in bfloat16, every residual stream, and the sampling offsets, whose errors the image's gradients
  magnify.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from tvm import relax

from dcnv3_tvm.op.relax_packed_op import is_dcnv3_packed
from dcnv3_tvm.transform.find_layers import Layer
from dcnv3_tvm.transform.ir import variables

MANY_SUMS: Final = 16
"""With two sums a block, the third stage of every released variant has more, all others fewer.

In float16 the rounding of its sums makes most of the error of its feature map and of the next: in
the last map of InternImage-T, 96x160 pixels, 2.1e-3 instead of 1.8e-3. Storing it in float32 takes
9 % more time for all the memory that a call of 64 images reads and writes.
"""


def float32_values(
    function: relax.Function, layers: Mapping[relax.Var, Layer], dtype: str
) -> set[relax.Var]:
    """Find the values of a function that are stored in float32.

    Parameters
    ----------
    function : relax.Function
        Channels last, with weights folded.
    layers : mapping of relax.Var to Layer
        Result of `find_layers`.
    dtype : str
        Element type of the model: float32, float16 or bfloat16.
    """
    found = _results(function)
    if dtype != "float32":
        found |= _long_streams(layers)
    if dtype == "bfloat16":
        found |= _streams_and_offsets(function, layers)
    return found


def _results(function: relax.Function) -> set[relax.Var]:
    """Find the variables that are a function's results, under any name."""
    found = set(variables(function.body.body))
    for block in reversed(function.body.blocks):
        for binding in reversed(block.bindings):
            if binding.var in found and not isinstance(binding.value, relax.Call):
                found.update(variables(binding.value))
    return found


def _streams_and_offsets(
    function: relax.Function, layers: Mapping[relax.Var, Layer]
) -> set[relax.Var]:
    found: set[relax.Var] = set()
    for block in function.body.blocks:
        for binding in block.bindings:
            layer = layers.get(binding.var)
            if layer is not None and layer.residual is not None:
                found.update((binding.var, layer.residual))
            elif is_dcnv3_packed(binding.value):
                found.add(binding.value.args[1])
    return found


def _long_streams(layers: Mapping[relax.Var, Layer]) -> set[relax.Var]:
    """Find residual streams of more than `MANY_SUMS` sums.

    Not where matmuls read the sums themselves, without a norm between: these would have to convert
    them, and could not copy them into shared memory past the registers.
    """
    streams: dict[relax.Var, list[relax.Var]] = {}
    for var, layer in layers.items():  # in the order in which they are computed
        if layer.residual is not None:
            stream = streams.pop(layer.residual, [layer.residual])
            streams[var] = [*stream, var]
    read = {layer.root.args[0] for layer in layers.values() if layer.kind != "layer_norm"}
    return {
        var
        for stream in streams.values()
        if len(stream) > MANY_SUMS and not read.intersection(stream[:-1])
        for var in stream
    }
