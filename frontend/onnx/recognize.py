"""Recognize DCNv3 in ONNX graphs, whatever nodes an exporter has made of it.

The published plugin's node is renamed, and a ``DeformConv`` that sums its samples converted.
Around every ``GridSample``, the values that may be x, offset, mask and the result of a DCNv3 are
looked for; the operator's parameters follow from where the nodes in between sample; and only if
these nodes compute the operator on random inputs, with offsets that leave the image, are they
replaced by one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Final

import onnx_ir as ir

from dcnv3_tvm.errors import InvalidArgumentError, ModelImportError
from dcnv3_tvm.frontend.onnx import dcnv3_node, deform_conv, forms
from dcnv3_tvm.frontend.onnx.evaluate import Subgraph
from dcnv3_tvm.frontend.onnx.graph import (
    Replacement,
    each_node,
    remove_unused,
    replace_node,
    spatial_sizes,
)
from dcnv3_tvm.frontend.onnx.infer_params import infer_grid_sample
from dcnv3_tvm.imported_model import SamplingCheck
from dcnv3_tvm.spec import DCNv3Params

_VIEWS: Final = frozenset(
    {"Reshape", "Transpose", "Identity", "Squeeze", "Unsqueeze", "Flatten", "Cast", "Pad"}
)
_ELEMENTWISE: Final = frozenset(
    {"Add", "Sub", "Mul", "Div", "Concat", "Split", "Slice", "Gather", "Expand", "Tile"}
)
"""Operators between the offsets and the sampled coordinates."""

_ATTRIBUTES: Final = {
    "align_corners": (0,),
    "mode": ("linear", "bilinear"),
    "padding_mode": ("zeros",),
}
"""Attributes of GridSample that are DCNv3's, the default first."""

_MAX_COMPARED: Final = 100_000_000
"""Most elements of a tensor that is filled with random numbers."""

_TOLERANCE: Final = 1e-4
"""Of the largest value: coordinates are computed in float32, in another order than ours."""


def recognize(graph: ir.Graph) -> tuple[SamplingCheck, ...]:
    """Replace the other forms of DCNv3 by this library's node; report what was found.

    Raises
    ------
    ModelImportError
        If a ``DeformConv`` is not a DCNv3.
    """
    for node in each_node(graph, lambda node: node.op_type == "DeformConv"):
        problem = deform_conv.convert(node)
        if problem is not None:
            raise ModelImportError(
                f"the node {_name(node)!r} (DeformConv) is not supported",
                got=problem,
                allowed="a DeformConv that computes DCNv3, as export_onnx writes it",
            )
    report = [
        SamplingCheck(_name(node), replaced=True, reason="the node is DCNv3 by definition")
        for node in graph
        if dcnv3_node.is_dcnv3(node)
    ]
    for node in each_node(graph, lambda node: node.op_type == "GridSample"):
        found = _replace_samples(node)
        if isinstance(found, float):
            report.append(SamplingCheck(_name(node), replaced=True, error=found))
        else:
            report.append(SamplingCheck(_name(node), replaced=False, reason=found))
    remove_unused(graph)
    return tuple(report)


def replace_plugins(graph: ir.Graph) -> None:
    """Replace the nodes of published plugins by nodes whose shape ONNX's tools can infer.

    Raises
    ------
    ModelImportError
        If a node has invalid attributes or inputs.
    """
    for node in each_node(graph, lambda node: node.op_type == forms.PLUGIN_OP):
        _replace_plugin(node)
        graph.opset_imports[dcnv3_node.DOMAIN] = dcnv3_node.VERSION
    for node in each_node(graph, lambda node: node.op_type == "grid_sampler"):
        _replace_grid_sampler(node)


def _name(node: ir.Node) -> str:
    return node.name or str(node.outputs[0].name)


def _replace_plugin(node: ir.Node) -> None:
    try:
        params = _plugin_params(node)
    except (InvalidArgumentError, KeyError, TypeError) as error:
        raise ModelImportError(
            f"the attributes of the node {_name(node)!r} ({forms.PLUGIN_OP}) are invalid",
            got=f"{type(error).__name__}: {error}",
        ) from error
    if len(node.inputs) != 3 or None in node.inputs:
        raise ModelImportError(
            f"the node {_name(node)!r} ({forms.PLUGIN_OP}) has no x, offset and mask",
            got=f"{len(node.inputs)} inputs",
        )
    x, offset, mask = node.inputs
    tape = Replacement(node)
    replace_node(node, dcnv3_node.emit(tape, x, offset, mask, params), tape)


def _replace_grid_sampler(node: ir.Node) -> None:
    """Replace ``mmdeploy::grid_sampler``, whose attributes are those of PyTorch's function."""
    values = {name: attribute.value for name, attribute in node.attributes.items()}
    try:
        attributes = {
            "mode": ("linear", "nearest", "cubic")[values["interpolation_mode"]],
            "padding_mode": ("zeros", "border", "reflection")[values["padding_mode"]],
            "align_corners": int(values["align_corners"]),
        }
    except (KeyError, IndexError, TypeError) as error:
        raise ModelImportError(
            f"the attributes of the node {_name(node)!r} (grid_sampler) are invalid",
            got=f"{type(error).__name__}: {error}",
        ) from error
    tape = Replacement(node)
    replace_node(node, tape.op("GridSample", list(node.inputs), attributes, version=20), tape)


def _plugin_params(node: ir.Node) -> DCNv3Params:
    values = {name: attribute.value for name, attribute in node.attributes.items()}

    def pair(name: str) -> tuple[int, int]:
        return values[f"{name}_h"], values[f"{name}_w"]

    return DCNv3Params(
        group=values["group"],
        kernel_size=pair("kernel"),
        stride=pair("stride"),
        pad=pair("pad"),
        dilation=pair("dilation"),
        offset_scale=values["offset_scale"],
        remove_center=bool(values.get("remove_center", 0)),
    )


def _replace_samples(node: ir.Node) -> float | str:
    """Replace the nodes around a sampling node; return the error, or why they are no DCNv3."""
    attributes = {name: attribute.value for name, attribute in node.attributes.items()}
    for name, values in _ATTRIBUTES.items():
        if attributes.get(name, values[0]) not in values:
            return f"it samples with {name}={attributes[name]!r}"
    results = list(_results(node))
    if not results:
        return "no value after it has the shape of DCNv3's result, (N, Ho, Wo, C)"
    image, coordinates = node.inputs
    weight = _mask_source(node)
    if weight is None:
        return "nothing multiplies its samples by a mask"
    reason = "no values before it have the shapes of DCNv3's x, offset and mask"
    for x in _upwards(image, _VIEWS):
        for offset in _upwards(coordinates, _VIEWS | _ELEMENTWISE):
            for mask in _upwards(weight, _VIEWS | _ELEMENTWISE):
                for result in results:
                    problem = _try(node, x, offset, mask, result)
                    if isinstance(problem, float):
                        return problem
                    reason = problem or reason
    return reason


def _try(
    node: ir.Node, x: ir.Value, offset: ir.Value, mask: ir.Value, result: ir.Value
) -> float | str:
    """Replace if the values are those of a DCNv3; return the error, or why they are not.

    The reason is empty if the shapes alone exclude it.
    """
    channels = _channels(x)
    if channels is None or channels != _channels(result) or not _rank(x) == _rank(result) == 4:
        return ""
    offsets, weights = _channels(offset), _channels(mask)
    if offsets is None or weights is None or offsets != 2 * weights:
        return ""
    subgraph = Subgraph.between([x, offset, mask], result)
    if subgraph is None:
        return "the nodes around it read other values than x, offset and mask"
    if max(map(math.prod, subgraph.shapes)) > _MAX_COMPARED:
        return "its tensors are too large to compare"
    inferred = infer_grid_sample(node, subgraph)
    if isinstance(inferred, str):
        return inferred
    error = subgraph.error_of(*inferred)
    if not error < _TOLERANCE:
        return f"it differs from DCNv3 by {error:.1e} of the largest value on random inputs"
    last = result.producer()
    assert last is not None
    tape = Replacement(last)
    params, scale, shift = inferred
    offset, mask = _flattened(tape, offset), _flattened(tape, mask)
    offset = forms.affine(tape, offset, range(len(scale)), scale, shift)
    replace_node(last, dcnv3_node.emit(tape, x, offset, mask, params), tape)
    return error


def _rank(value: ir.Value) -> int:
    return 0 if value.shape is None else len(value.shape)


def _channels(value: ir.Value) -> int | None:
    """Return the size of the axes after (N, H, W) together."""
    sizes = () if value.shape is None else tuple(value.shape)[3:]
    known = [size for size in sizes if isinstance(size, int)]
    return math.prod(known) if known and len(known) == len(sizes) else None


def _flattened(tape: Replacement, value: ir.Value) -> ir.Value:
    """Return a value as (N, H, W, channels)."""
    if _rank(value) == 4 or value.shape is None:
        return value
    return tape.reshape(value, [0, *spatial_sizes(value), _channels(value) or 0])


def _results(node: ir.Node) -> Iterator[ir.Value]:
    """List values after a sampling node that may be DCNv3's result, nearest first."""
    value = node.outputs[0]
    for _ in range(12):
        if _rank(value) == 4 and node.outputs[0] is not value:
            yield value
        readers = {use.node for use in value.uses()}
        if len(readers) != 1:
            return
        reader = readers.pop()
        if reader.op_type not in _VIEWS | {"Mul", "ReduceSum"}:
            return
        value = reader.outputs[0]


def _mask_source(node: ir.Node) -> ir.Value | None:
    """Return the value that the samples are multiplied by."""
    value = node.outputs[0]
    for _ in range(6):
        uses = list(value.uses())
        if len(uses) != 1:
            return None
        reader = uses[0].node
        if reader.op_type == "Mul":
            return next((other for other in reader.inputs if other is not value), None)
        if reader.op_type not in _VIEWS:
            return None
        value = reader.outputs[0]
    return None


def _upwards(value: ir.Value | None, through: frozenset[str]) -> list[ir.Value]:
    """List the values that `value` is computed from by operators of a kind, farthest first.

    Only along the one input that depends on the graph's inputs. Farthest first, because nearer
    values are views of them, with the same shape or another.
    """
    chain: list[ir.Value] = []
    fixed: dict[ir.Value, bool] = {}
    while value is not None and len(chain) < 24:
        chain.append(value)
        node = value.producer()
        if node is None or node.op_type not in through:
            break
        sources = [
            source for source in node.inputs if source is not None and not _is_fixed(source, fixed)
        ]
        value = sources[0] if len(set(sources)) == 1 else None
    return [value for value in reversed(chain) if _rank(value) >= 4]


def _is_fixed(value: ir.Value, known: dict[ir.Value, bool]) -> bool:
    """Whether a value depends on no input, or on the shapes of inputs alone."""
    if value not in known:
        node = value.producer()
        known[value] = True  # ends the recursion in a graph with a cycle
        known[value] = ir.convenience.get_const_tensor(value) is not None or (
            node is not None
            and (
                node.op_type == "Shape"
                or all(_is_fixed(source, known) for source in node.inputs if source is not None)
            )
        )
    return known[value]
