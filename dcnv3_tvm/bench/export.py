"""Export of a problem's PyTorch module to ONNX, for the runtimes that read ONNX files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from dcnv3_tvm import files

if TYPE_CHECKING:
    from dcnv3_tvm.frontend.onnx import FormName


class OnnxFile:
    """An ONNX file in a temporary folder, which is deleted with this object.

    Parameters
    ----------
    module : torch.nn.Module
        Module to export, for the shapes of `inputs`.
    inputs : mapping of str to numpy.ndarray
        Arguments by name, in order.
    form : str
        How DCNv3 is expressed, see `dcnv3_tvm.frontend.export_onnx`.
    """

    def __init__(self, module: nn.Module, inputs: Mapping[str, Any], form: FormName) -> None:
        # It needs TVM, which machines that run code compiled elsewhere do not have.
        from dcnv3_tvm.frontend.onnx.export import export_onnx

        self._folder = files.temporary_folder("bench-")
        self.path = Path(self._folder.name) / "model.onnx"
        arguments = tuple(torch.from_numpy(array) for array in inputs.values())
        export_onnx(module, self.path, example=arguments, form=form)
