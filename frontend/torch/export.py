"""Trace an entry point with ``torch.export``."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, TensorArgument
from torch.fx import Node

from dcnv3_tvm.errors import InvalidArgumentError, ModelImportError
from dcnv3_tvm.frontend.torch.call_state import export_stateless
from dcnv3_tvm.frontend.torch.entry_points import EntryPoint
from dcnv3_tvm.frontend.torch.fx_nodes import source_line
from dcnv3_tvm.frontend.torch.model_state import ModelState
from dcnv3_tvm.frontend.torch.regions import inline_regions
from dcnv3_tvm.signature import parse_size


def export_entry_point(entry_point: EntryPoint) -> ExportedProgram:
    """Export a call of the model.

    Raises
    ------
    ModelImportError
        If ``torch.export`` fails, or the result depends on earlier calls or random numbers.
    """
    program = export_stateless(entry_point, entry_point.model, lambda: _export(entry_point))
    _check_random(program)
    _buffers_to_parameters(program)
    return program


def _export(entry_point: EntryPoint) -> ExportedProgram:
    inputs = entry_point.inputs
    dynamic = tuple(
        {
            axis: torch.export.Dim.DYNAMIC
            for axis, size in enumerate(info.kernel_shape(info.shape))
            if isinstance(size, str)
        }
        for info in inputs.infos
    )
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # raised inside PyTorch
            warnings.filterwarnings("ignore", ".* assigned during export")  # checked by ourselves
            program = torch.export.export(
                entry_point,
                inputs.examples,
                dynamic_shapes={"tensors": dynamic} if any(dynamic) else None,
                strict=False,
            )
    except (ModelImportError, InvalidArgumentError):
        raise
    except Exception as error:  # raised by the model's own code, or by PyTorch tracing it
        if any(dynamic):
            hint = (
                "Try fixed sizes (dynamic_batch=False, dynamic_size=False), or sizes that are "
                "multiples of a number (dynamic_size=32). A model that keeps anchors or grids from "
                "call to call has to be imported before its first call."
            )
        else:
            hint = (
                "Check that the model runs on this example: image batches are float32 of shape "
                "(N, 3, H, W), channels first."
            )
        shapes = ", ".join(f"{info.name}: {info.describe()} {info.dtype}" for info in inputs.infos)
        raise ModelImportError(
            "torch.export cannot trace the model",
            got=f"{shapes}; {type(error).__name__}: {error}",
            hint=hint,
        ) from error
    inline_regions(program)
    return program


def runs_with_sizes(entry_point: EntryPoint, sizes: Mapping[str, int]) -> bool:
    """Whether PyTorch runs the call for other dynamic sizes; nothing is computed."""
    inputs = entry_point.inputs

    def size_of(size: int | str) -> int:
        return size if isinstance(size, int) else sizes[parse_size(size)[1]]

    logger = logging.getLogger("torch._subclasses.fake_tensor")
    disabled, logger.disabled = logger.disabled, True  # It prints the error of such a size.
    state = ModelState(entry_point.model)
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
            entry_point(
                *(
                    torch.empty(
                        [size_of(size) for size in info.shape],
                        dtype=example.dtype,
                        device=example.device,
                    )
                    for info, example in zip(inputs.infos, inputs.examples, strict=True)
                )
            )
    except Exception:  # raised by the model's own code, or by PyTorch, for these sizes
        return False
    finally:
        logger.disabled = disabled
        state.restore()
    return True


def _check_random(program: ExportedProgram) -> None:
    """Check that the program draws no random numbers."""
    drawing = [source_line(node) for node in program.graph.nodes if _draws_random_numbers(node)]
    if drawing:
        raise ModelImportError(
            "the model draws random numbers",
            got="".join(f"\n  {line}" for line in drawing),
            hint="Leave this out in inference (self.training), or make the numbers an input.",
        )


def _draws_random_numbers(node: Node) -> bool:
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    schema = node.target._schema.arguments
    values = {each.name: each.default_value for each in schema}
    values |= zip((each.name for each in schema), node.args, strict=False)
    values |= node.kwargs
    if not (torch.Tag.nondeterministic_seeded in node.target.tags or "dropout_p" in values):
        return False
    return not (
        values.get("train") is False
        or values.get("training") is False
        or values.get("dropout_p", values.get("p")) == 0
    )


def _buffers_to_parameters(program: ExportedProgram) -> None:
    """Make persistent buffers (the statistics of BatchNorm) weights like any other."""
    placeholders = {node.name: node for node in program.graph.find_nodes(op="placeholder")}
    for spec in program.graph_signature.input_specs:
        if spec.kind is InputKind.BUFFER and spec.persistent:
            spec.kind, spec.persistent = InputKind.PARAMETER, None
            buffer = program.state_dict[spec.target]
            program.state_dict[spec.target] = nn.Parameter(buffer, requires_grad=False)
            # Decompositions give this name to parameters.
            placeholder = placeholders[spec.arg.name]
            placeholder._rename(f"p_{spec.arg.name.removeprefix('b_')}")
            spec.arg = TensorArgument(placeholder.name)
