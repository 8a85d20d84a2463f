"""Trace an entry point with ``torch.export``, and check that the operator is in the graph."""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.export import ExportedProgram

from dcnv3_tvm.errors import InvalidArgumentError, ModelImportError
from dcnv3_tvm.frontend.torch.entry_points import MODEL_PREFIX, EntryPoint


def export_entry_point(
    entry_point: EntryPoint, image: Tensor, dynamic_axes: set[int]
) -> ExportedProgram:
    """Export a call of the model.

    Parameters
    ----------
    entry_point : EntryPoint
        The call.
    image : Tensor
        Example (N, 3, H, W).
    dynamic_axes : set of int
        Axes of the image whose size is dynamic.

    Raises
    ------
    ModelImportError
        If ``torch.export`` fails.
    """
    dynamic = dict.fromkeys(sorted(dynamic_axes), torch.export.Dim.DYNAMIC)
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # raised inside PyTorch
            return torch.export.export(
                entry_point,
                (image,),
                dynamic_shapes={"image": dynamic} if dynamic else None,
                strict=False,
            )
    except (ModelImportError, InvalidArgumentError):
        raise
    except Exception as error:  # raised by the model's own code, or by PyTorch tracing it
        if dynamic:
            hint = "Try fixed sizes: dynamic_batch=False, dynamic_size=False."
        else:
            hint = "Check that the model runs on this example: (N, 3, H, W), channels first."
        raise ModelImportError(
            "torch.export cannot trace the model",
            got=f"example {tuple(image.shape)}: {type(error).__name__}: {error}",
            hint=hint,
        ) from error


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
