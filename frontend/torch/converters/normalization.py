"""Converters of normalization layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

import numpy as np
from torch.fx import Node
from tvm import relax

from dcnv3_tvm.frontend.torch.fx_nodes import constant, node_arguments, unsupported
from dcnv3_tvm.transform.ir import dimensions


def _batch_norm(node: Node, importer: Any) -> relax.Var:
    # TVM's converter treats this node as one in training mode.
    args = node_arguments(node, importer)
    x, mean, variance = (args[name] for name in ("input", "running_mean", "running_var"))
    if args["training"] or mean is None or variance is None:
        raise unsupported(
            "batch_norm by the statistics of the batch is not supported",
            node,
            "Use track_running_stats=True, InstanceNorm or GroupNorm.",
        )
    channels = dimensions(x)[1]
    result = relax.op.nn.batch_norm(
        x,
        _weight_or_default(args["weight"], np.ones, (channels,)),
        _weight_or_default(args["bias"], np.zeros, (channels,)),
        mean,
        variance,
        axis=1,
        epsilon=args["eps"],
        training=False,
    )
    return importer.block_builder.emit(relax.TupleGetItem(importer.block_builder.emit(result), 0))


def _layer_norm(node: Node, importer: Any) -> relax.Var:
    # TVM's converter fails without a weight or a bias.
    args = node_arguments(node, importer)
    shape = args["normalized_shape"]
    result = relax.op.nn.layer_norm(
        args["input"],
        _weight_or_default(args["weight"], np.ones, shape),
        _weight_or_default(args["bias"], np.zeros, shape),
        axes=list(range(-len(shape), 0)),
        epsilon=args["eps"],
    )
    return importer.block_builder.emit(result)


def _group_norm(node: Node, importer: Any) -> relax.Var:
    # TVM's converter fails without a weight or a bias.
    groups = node_arguments(node, importer)["num_groups"]
    return _spatial_norm(node, importer, relax.op.nn.group_norm, num_groups=groups)


def _instance_norm(node: Node, importer: Any) -> relax.Var:
    # TVM's converter reads epsilon from the wrong argument.
    if not node_arguments(node, importer)["use_input_stats"]:
        raise unsupported(
            "instance_norm with running statistics is not supported", node, "Use a BatchNorm."
        )
    return _spatial_norm(node, importer, relax.op.nn.instance_norm)


def _spatial_norm(
    node: Node, importer: Any, norm: Callable[..., relax.Expr], **options: Any
) -> relax.Var:
    """Convert a norm over the spatial axes of (N, C, ...)."""
    args = node_arguments(node, importer)
    x = args["input"]
    channels = dimensions(x)[1]
    result = norm(
        x,
        _weight_or_default(args["weight"], np.ones, (channels,)),
        _weight_or_default(args["bias"], np.zeros, (channels,)),
        channel_axis=1,
        axes=list(range(2, x.ty.ndim)),
        epsilon=args["eps"],
        **options,
    )
    return importer.block_builder.emit(result)


def _weight_or_default(
    weight: relax.Expr | None, default: Callable[..., Any], shape: Sequence[int]
) -> relax.Expr:
    return constant(default(shape)) if weight is None else weight


NORMALIZATION: Final[dict[str, Callable[[Node, Any], relax.Var]]] = {
    "batch_norm.default": _batch_norm,
    "group_norm.default": _group_norm,
    "instance_norm.default": _instance_norm,
    "layer_norm.default": _layer_norm,
}
