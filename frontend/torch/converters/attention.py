"""Converter of scaled dot-product attention."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Final

from torch.fx import Node
from tvm import relax

from dcnv3_tvm.frontend.torch.fx_nodes import constant, node_arguments, unsupported
from dcnv3_tvm.transform.ir import dimensions, element_type


def _attention(node: Node, importer: Any) -> relax.Var:
    # TVM's converter ignores the scale, and its operator does not support dynamic shapes.
    args = node_arguments(node, importer)
    query, key, value = args["query"], args["key"], args["value"]
    if args["enable_gqa"] or args["dropout_p"]:
        raise unsupported(
            "scaled_dot_product_attention with dropout or grouped-query attention is not supported",
            node,
            "Write the attention as matmul, softmax and matmul.",
        )
    dtype = element_type(query)
    scale = args["scale"] or 1 / math.sqrt(dimensions(query)[-1])
    swapped = [*range(query.ty.ndim - 2), -1, -2]
    scores = relax.op.matmul(
        relax.op.multiply(query, constant(scale, dtype)), relax.op.permute_dims(key, swapped)
    )
    mask = args["attn_mask"]
    if args["is_causal"]:
        rows, columns = (
            relax.op.arange(0, dimensions(tokens)[-2], 1, "int64") for tokens in (query, key)
        )
        mask = relax.op.less_equal(columns, relax.op.expand_dims(rows, 1))
    if mask is not None:
        mask = importer.block_builder.emit(mask)
        if element_type(mask) == "bool":
            scores = relax.op.where(mask, scores, constant(-math.inf, dtype))
        else:
            scores = relax.op.add(scores, mask)
    weights = relax.op.nn.softmax(scores, -1)
    return importer.block_builder.emit(relax.op.matmul(weights, value))


ATTENTION: Final[dict[str, Callable[[Node, Any], relax.Var]]] = {
    "scaled_dot_product_attention.default": _attention,
}
