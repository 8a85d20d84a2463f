"""From a program that torch.export made to one Relax function."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, Final

import numpy as np
import torch
from torch.export import ExportedProgram
from torch.fx import Node
from tvm import relax
from tvm.relax.frontend.torch import exported_program_translator as translator

from dcnv3_tvm.errors import ModelImportError
from dcnv3_tvm.op import relax_op


def convert(program: ExportedProgram) -> relax.Function:
    """Convert a program to a function of its inputs followed by its parameters.

    Operators that Relax knows are kept whole: a linear layer or a layer norm says more than its
    pieces, and later passes look for them.

    Raises
    ------
    ModelImportError
        If operators cannot be converted; it lists each with the line of its source.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of PyTorch about itself
        program = _decomposed_as_needed(program)
    try:
        module = translator.from_exported_program(
            program,
            keep_params_as_input=True,
            custom_convert_map=_CONVERTERS,
            run_ep_decomposition=False,
        )
    except Exception as error:
        raise ModelImportError(
            "TVM cannot convert the exported model", got=f"{type(error).__name__}: {error}"
        ) from error
    return module["main"].without_attr("params")


def _decomposed_as_needed(program: ExportedProgram) -> ExportedProgram:
    """Take apart what has no converter, and nothing where all is known.

    A decomposition traces the whole program anew, which takes longer than the export did.
    """
    table = torch.export.default_decompositions()
    known = {*translator.ExportedProgramImporter().create_convert_map(), *_CONVERTERS}
    chosen: dict[Any, Any] = {}
    settled = all(map(_is_settled, program.graph.nodes))
    decomposed = False
    while True:
        missing = [
            node
            for node in program.graph.nodes
            if node.op == "call_function" and node.target.__name__ not in known
        ]
        if settled and not missing:
            return program
        news = {
            node.target: table[node.target]
            for node in missing
            if node.target in table and node.target not in chosen
        }
        # The first time without a choice still takes blocks without gradients apart.
        if decomposed and not news:
            raise _unsupported(missing)
        chosen |= news
        program = program.run_decompositions(chosen)
        settled = decomposed = True


def _is_settled(node: Node) -> bool:
    """Tell whether a decomposition would leave a node as it is, or give the same Relax.

    It makes new tensors of what is changed in place, and other operators of many views.
    """
    if not isinstance(node.target, torch._ops.OpOverload):
        return True
    schema = node.target._schema
    if schema.is_mutable:
        return False
    if not any(result.alias_info for result in schema.returns):
        return True
    # TVM finds no shape for what joins sizes known only at run time.
    return node.target.__name__ in _VIEWS and _symbols(node) == _symbols(node.args[0])


def _symbols(node: Any) -> list[str]:
    return [str(size) for size in node.meta["val"].shape if not isinstance(size, int)]


def _unsupported(nodes: list[Node]) -> ModelImportError:
    lines = []
    for node in nodes:
        trace = [line.strip() for line in (node.stack_trace or "").splitlines() if line.strip()]
        lines.append(f"\n  {node.target}: {' | '.join(trace[-2:]) or 'source unknown'}")
    return ModelImportError(
        f"the model holds {len(nodes)} operations that cannot become Relax",
        got="".join(lines),
        hint="Write them with other PyTorch functions.",
    )


def _arguments(node: Node, importer: Any, count: int) -> list[Any]:
    """Return the first arguments of a node; None for what is left to its default."""
    given = list(importer.retrieve_args(node))
    return [*given, *[None] * count][:count]


def _dcnv3(node: Node, importer: Any) -> relax.Var:
    schema = torch.ops.dcnv3_tvm.dcnv3.default._schema
    names = [argument.name for argument in schema.arguments]
    values = dict(zip(names, importer.retrieve_args(node), strict=True))
    x, offset, mask = (values.pop(name) for name in ("x", "offset", "mask"))
    return importer.block_builder.emit(relax_op.dcnv3(x, offset, mask, **values))


def _batch_norm(node: Node, importer: Any) -> relax.Var:
    # TVM's own converter takes this node for one in training mode.
    x, weight, bias, mean, variance, training, _, epsilon = _arguments(node, importer, 8)
    if training or mean is None or variance is None:
        raise ModelImportError(
            "a batch normalisation has no statistics of its own", got=str(node.stack_trace)
        )
    channels = x.ty.shape[1]
    result = relax.op.nn.batch_norm(
        x,
        _constant(np.ones, (channels,)) if weight is None else weight,
        _constant(np.zeros, (channels,)) if bias is None else bias,
        mean,
        variance,
        axis=1,
        epsilon=epsilon,
        training=False,
    )
    return importer.block_builder.emit(relax.TupleGetItem(importer.block_builder.emit(result), 0))


def _layer_norm(node: Node, importer: Any) -> relax.Var:
    # TVM's own converter fails where there is no weight or no bias.
    x, shape, weight, bias, epsilon = _arguments(node, importer, 5)
    result = relax.op.nn.layer_norm(
        x,
        _constant(np.ones, shape) if weight is None else weight,
        _constant(np.zeros, shape) if bias is None else bias,
        axes=list(range(-len(shape), 0)),
        epsilon=1e-5 if epsilon is None else epsilon,
    )
    return importer.block_builder.emit(result)


def _constant(filled: Callable[..., Any], shape: Any) -> relax.Constant:
    return relax.const(filled([int(size) for size in shape], "float32"))


def _pixel_shuffle(node: Node, importer: Any) -> relax.Var:
    # TVM has the operator, and no kernel to legalise it to.
    x, factor = _arguments(node, importer, 2)
    batch, channels, height, width = x.ty.shape.values
    outer = channels // (factor * factor)
    parts = relax.op.reshape(x, (batch, outer, factor, factor, height, width))
    woven = relax.op.permute_dims(parts, [0, 1, 4, 2, 5, 3])
    result = relax.op.reshape(woven, (batch, outer, height * factor, width * factor))
    return importer.block_builder.emit(result)


def _cast(node: Node, importer: Any) -> relax.Var:
    # TVM's own converter keeps casts to the type that a tensor has already.
    x, dtype = _arguments(node, importer, 2)
    name = str(dtype).removeprefix("torch.")
    if x.ty.dtype.dtype == name:
        return x
    return importer.block_builder.emit(relax.op.astype(x, name))


def _repeat_interleave(node: Node, importer: Any) -> relax.Var:
    # TVM has no converter, and for one such node the whole program would be decomposed.
    x, repeats, dim = _arguments(node, importer, 3)
    emit = importer.block_builder.emit
    if dim is None:
        x, dim = emit(relax.op.reshape(x, (-1,))), 0
    axis = dim % x.ty.ndim
    before, (size, *after) = list(x.ty.shape.values[:axis]), x.ty.shape.values[axis:]
    apart = emit(relax.op.expand_dims(x, axis + 1))
    repeated = emit(relax.op.broadcast_to(apart, [*before, size, repeats, *after]))
    return emit(relax.op.reshape(repeated, [*before, size * repeats, *after]))


def _rsub(node: Node, importer: Any) -> relax.Var:
    # TVM's own converter makes an integer of the 1 in `1 - gate`.
    x, scalar, alpha = _arguments(node, importer, 3)
    dtype = x.ty.dtype.dtype
    scaled = x if alpha in (None, 1) else relax.op.multiply(x, relax.const(alpha, dtype))
    return importer.block_builder.emit(relax.op.subtract(relax.const(scalar, dtype), scaled))


_VIEWS: Final = frozenset(
    {
        "contiguous.default",
        "flatten.using_ints",
        "permute.default",
        "reshape.default",
        "squeeze.dim",
        "to.dtype",
        "transpose.int",
        "unflatten.int",
        "unsqueeze.default",
        "view.default",
    }
)
"""Names of what may be a view, and is converted to the same with and without a decomposition."""

_CONVERTERS: Final[dict[str, Callable[[Node, Any], relax.Var]]] = {
    "dcnv3.default": _dcnv3,
    "batch_norm.default": _batch_norm,
    "layer_norm.default": _layer_norm,
    "pixel_shuffle.default": _pixel_shuffle,
    "repeat_interleave.self_int": _repeat_interleave,
    "rsub.Scalar": _rsub,
    "to.dtype": _cast,
}
"""By node name. All but the first stand in for converters of TVM that are wrong or missing."""
