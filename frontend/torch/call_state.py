"""Check that each call of a model computes the same function, whatever was computed before.

``torch.export`` traces one call, so a model that reads what an earlier call has left is imported
wrongly. If the traced call has changed the model's state, two successive calls are traced: the
second must depend on its own inputs alone, compute what the first does, and leave the state as it
found it. By induction this holds for all further calls.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, InputSpec
from torch.fx import Graph, Node

from dcnv3_tvm.errors import ModelImportError
from dcnv3_tvm.frontend.torch.entry_points import MODEL_PREFIX
from dcnv3_tvm.frontend.torch.model_state import ModelState, TensorValue

_MOST_NAMES: Final = 8
"""Most names of state in an error."""

Export = Callable[[], ExportedProgram]


def export_stateless(entry_point: nn.Module, model: nn.Module, export: Export) -> ExportedProgram:
    """Export a call, and check that it depends on its inputs alone.

    Parameters
    ----------
    entry_point : nn.Module
        Takes tensors and returns a flat tuple of tensors.
    model : nn.Module
        The model that it calls.
    export : callable
        Exports `entry_point`.

    Raises
    ------
    ModelImportError
        If the result depends on earlier calls; the error names the state.
    """
    state = ModelState(model)
    try:
        with _recorded(entry_point, state) as (before, after):
            program = export()
        changed = _differences(before[-1], after[-1]) + _mutated(program)
        if changed:
            state.restore()
            _check_second_call(entry_point, state, export, changed)
            _remove_writes(program)
        return program
    finally:
        state.restore()


def _check_second_call(
    entry_point: nn.Module, state: ModelState, export: Export, changed: Sequence[str]
) -> None:
    def fail(names: Sequence[str], cause: Exception | None = None) -> None:
        different = list(dict.fromkeys(names))
        more = [f"and {len(different) - _MOST_NAMES} more"] * (len(different) > _MOST_NAMES)
        raise ModelImportError(
            "the result of the model depends on earlier calls",
            got=f"state that a call changes: {', '.join(different[:_MOST_NAMES] + more)}",
            allowed="a model whose result depends on its inputs alone",
            hint="Make such a value an input and an output of forward, or do not keep it.",
        ) from cause

    try:
        with _recorded(entry_point, state) as (_, after), _called_twice(entry_point) as count:
            program = export()
    except ModelImportError as error:
        fail(changed, error)
    unsettled = _differences(
        *({k: v for k, v in each.items() if not isinstance(v, TensorValue)} for each in after)
    )
    if unsettled:
        fail(unsettled)
    if not _calls_agree(program, count):
        fail(changed)


@contextmanager
def _recorded(
    entry_point: nn.Module, state: ModelState
) -> Iterator[tuple[list[dict[str, Any]], list[dict[str, Any]]]]:
    """Record the state before and after each call."""
    before: list[dict[str, Any]] = []
    after: list[dict[str, Any]] = []
    handles = (
        entry_point.register_forward_pre_hook(lambda *_: before.append(state.read())),
        entry_point.register_forward_hook(lambda *_: after.append(state.read())),
    )
    try:
        yield before, after
    finally:
        for handle in handles:
            handle.remove()


class _Counts:
    """Numbers of tensors, known after the export."""

    results = 0


@contextmanager
def _called_twice(entry_point: nn.Module) -> Iterator[_Counts]:
    """Make a call a call followed by another one with other inputs.

    It returns the results of both, and the inputs of the second.
    """
    counts = _Counts()
    calling = False

    def call_again(module: nn.Module, inputs: tuple[Tensor, ...], results: Any) -> Any:
        nonlocal calling
        if calling:
            return results
        others = tuple(torch.zeros_like(each) for each in inputs)
        counts.results = len(results)
        calling = True
        try:
            return (*results, *module(*others), *others)
        finally:
            calling = False

    handle = entry_point.register_forward_hook(call_again)
    try:
        yield counts
    finally:
        handle.remove()


def _differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    missing = object()
    pairs = {
        name: (before.get(name, missing), after.get(name, missing))
        for name in dict.fromkeys((*before, *after))
    }
    return [name for name, (a, b) in pairs.items() if a is not b and a != b]  # NaN is unequal


def _mutated(program: ExportedProgram) -> list[str]:
    """Return the names of the model's tensors that the program writes to."""
    return [
        str(spec.target).removeprefix(MODEL_PREFIX)
        for _, spec in _writes(program)
        if spec.kind not in (InputKind.USER_INPUT, InputKind.CONSTANT_TENSOR)
    ]


def _writes(program: ExportedProgram) -> Iterator[tuple[Node, InputSpec]]:
    """Yield the operators that write to an input of the program, and that input."""
    specs = {spec.arg.name: spec for spec in program.graph_signature.input_specs}
    roots: dict[Node, Node] = {}
    for node in program.graph.nodes:
        roots[node] = _root(node, roots)
        for each in _written(node):
            if roots[each].name in specs:
                yield node, specs[roots[each].name]


def _remove_writes(program: ExportedProgram) -> None:
    """Remove writes to the model's tensors that nothing reads."""
    for node, spec in reversed(list(_writes(program))):
        if spec.kind is not InputKind.USER_INPUT and not node.users:
            program.graph.erase_node(node)
    program.graph_module.recompile()


def _calls_agree(program: ExportedProgram, counts: _Counts) -> bool:
    """Whether both calls are the same function of their inputs."""
    specs = program.graph_signature.input_specs
    by_name = {node.name: node for node in program.graph.find_nodes(op="placeholder")}
    first = [by_name[spec.arg.name] for spec in specs if spec.kind is InputKind.USER_INPUT]
    outputs = list(program.graph.output_node().args[0])
    outputs = outputs[-(2 * counts.results + len(first)) :]  # Mutated buffers may precede them.
    second = outputs[2 * counts.results :]
    labels: dict[Node, Any] = {
        by_name[spec.arg.name]: _weight_label(program, spec)
        for spec in specs
        if spec.kind is not InputKind.USER_INPUT
    }
    numbers: dict[Any, int] = {}
    inputs = {node: ("input", i) for i, node in enumerate(first)}
    earlier = {node: ("earlier input", i) for i, node in enumerate(first)}
    others = {node: ("input", i) for i, node in enumerate(second)}
    here = _number_values(program.graph, labels | inputs, numbers)
    there = _number_values(program.graph, labels | earlier | others, numbers)
    pairs = zip(outputs[: counts.results], outputs[counts.results :], strict=False)
    return all(here(a) == there(b) for a, b in pairs)


def _weight_label(program: ExportedProgram, spec: Any) -> Any:
    value = program.constants.get(spec.target)
    if isinstance(value, Tensor) and spec.kind is InputKind.CONSTANT_TENSOR:
        # A constant of forward is another one in each call.
        return (str(value.dtype), tuple(value.shape), value.numpy().tobytes())
    return spec.target


def _number_values(
    graph: Graph, labels: Mapping[Node, Any], numbers: dict[Any, int]
) -> Callable[[Node], Any]:
    """Give numbers to the values of a graph: equal expressions have equal numbers.

    A tensor that is written to has a new number from there on.
    """
    values: dict[Node, int] = {}
    roots: dict[Node, Node] = {}
    writes: dict[Node, int] = {}

    def read(node: Node) -> Any:
        return values[node], writes.get(roots[node])

    for node in graph.nodes:
        if node.op == "output":
            break
        roots[node] = _root(node, roots)
        if node in labels:
            key = labels[node]
        elif not isinstance(node.meta.get("val"), (Tensor, tuple, list)):
            key = str(node.meta.get("val", node.target))  # a size
        else:
            creates = str(node.target).split(".")[1:2]
            arguments = (node.args[1:] if creates and _is_filled(creates[0]) else node.args,)
            key = (str(node.target), repr(_mapped((*arguments, node.kwargs), read)))
        values[node] = numbers.setdefault(key, len(numbers))
        for each in _written(node):
            writes[roots[each]] = values[node]
    return read


def _mapped(value: Any, read: Callable[[Node], Any]) -> Any:
    if isinstance(value, Node):
        return read(value)
    if isinstance(value, (tuple, list)):
        return [_mapped(each, read) for each in value]
    if isinstance(value, dict):
        return {name: _mapped(each, read) for name, each in value.items()}
    return value


def _is_filled(name: str) -> bool:
    """Whether an operator takes shape and dtype, but no values, from its first argument."""
    return name.endswith("_like") or name.startswith("new_")


def _root(node: Node, roots: Mapping[Node, Node]) -> Node:
    """Return the node whose memory a node may share."""
    schema = getattr(node.target, "_schema", None)
    if schema is None or not any(result.alias_info for result in schema.returns):
        return node
    for argument, value in zip(schema.arguments, node.args, strict=False):
        if argument.alias_info and isinstance(value, Node):
            return roots[value]
    return node


def _written(node: Node) -> list[Node]:
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return []
    return [
        value
        for argument, value in zip(schema.arguments, node.args, strict=False)
        if argument.alias_info and argument.alias_info.is_write and isinstance(value, Node)
    ]
