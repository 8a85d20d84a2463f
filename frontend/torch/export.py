"""Trace an entry point with ``torch.export``, and check that the operator is in the graph."""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Mapping, Sequence

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import ExportedProgram

from dcnv3_tvm.errors import InvalidArgumentError, ModelImportError
from dcnv3_tvm.frontend.torch.entry_points import MODEL_PREFIX, EntryPoint
from dcnv3_tvm.signature import parse_size


def export_entry_point(entry_point: EntryPoint) -> ExportedProgram:
    """Export a call of the model.

    Raises
    ------
    ModelImportError
        If ``torch.export`` fails.
    """
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
            return torch.export.export(
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


def runs_with_sizes(entry_point: EntryPoint, sizes: Mapping[str, int]) -> bool:
    """Whether PyTorch runs the call for other dynamic sizes; nothing is computed."""
    inputs = entry_point.inputs

    def size_of(size: int | str) -> int:
        return size if isinstance(size, int) else sizes[parse_size(size)[1]]

    logger = logging.getLogger("torch._subclasses.fake_tensor")
    disabled, logger.disabled = logger.disabled, True  # It prints the error of such a size.
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
    return True


def check_dcnv3_calls(program: ExportedProgram, dcnv3_modules: Sequence[str]) -> None:
    """Check that each DCNv3 module that ran called the operator.

    Parameters
    ----------
    program : ExportedProgram
        An exported entry point.
    dcnv3_modules : sequence of str
        Paths of the model's DCNv3 modules.

    Raises
    ------
    ModelImportError
        If one of them ran without calling the operator, or there is no call at all.
    """
    ran: set[str] = set()
    with_operator: set[str] = set()
    for node in program.graph.nodes:
        stack = node.meta.get("nn_module_stack", {}).values()
        paths = {re.sub(r"^L\['self'\]\.", "", str(path)) for path, _ in stack}
        ran |= paths
        if node.target is torch.ops.dcnv3_tvm.dcnv3.default:
            with_operator |= paths
    modules = {f"{MODEL_PREFIX}{path}".rstrip("."): path for path in dcnv3_modules}
    without = sorted(path for key, path in modules.items() if key in ran - with_operator)
    if not with_operator or without:
        raise ModelImportError(
            "the model does not call the DCNv3 operator where it should",
            got=f"DCNv3 modules without a call: {', '.join(without)}" if without else "no call",
            hint="A forward that imports or selects its sampling function while it runs is not "
            "supported: let it call a global dcnv3_core_pytorch, or "
            "dcnv3_tvm.pytorch.operator.dcnv3.",
        )
