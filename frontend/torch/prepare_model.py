"""Copy a PyTorch model for export, with its DCNv3 modules calling this library's operator."""

from __future__ import annotations

import copy
from typing import Any, Final, NamedTuple

from torch import Tensor, nn

from dcnv3_tvm.errors import ModelImportError
from dcnv3_tvm.frontend.torch.model_state import ModelState
from dcnv3_tvm.frontend.torch.replace_forward import (
    compare_forward,
    has_dcnv3_layers,
    module_source,
    use_published_forward,
)
from dcnv3_tvm.frontend.torch.replace_sampling import SamplingReplacement
from dcnv3_tvm.imported_model import SamplingCheck

_CHECKPOINTING_FLAGS: Final = ("with_cp", "gradient_checkpointing", "use_checkpoint")

_DCNV4_FLAG: Final = "use_dcn_v4_op"
"""Attribute of published DCNv3 modules: they compute the same with the kernel of DCNv4."""


class PreparedModel(NamedTuple):
    """A copy of a model, ready for export.

    Parameters
    ----------
    model : nn.Module
        In inference mode; shares its tensors with the original.
    dcnv3_modules : dict of str to SamplingCheck or None
        What was found about each module with the layers of DCNv3, by path. None for modules that
        call the operator or a published sampling function.
    """

    model: nn.Module
    dcnv3_modules: dict[str, SamplingCheck | None]


def prepare_model(module: nn.Module, sampling: SamplingReplacement) -> PreparedModel:
    """Copy `module` without its tensors and make its DCNv3 modules call the operator.

    Parameters
    ----------
    module : nn.Module
        Any module that contains DCNv3 modules. It is not changed.
    sampling : SamplingReplacement
        The active replacement of sampling functions.

    Raises
    ------
    ModelImportError
        If the module cannot be copied.
    """
    model = _copy_sharing_tensors(module)
    parts = {}
    through_dcnv4 = []
    for path, part in model.named_modules():
        # Not model.eval(): train() of the published detection class does not return the module.
        part.training = False
        for flag in _CHECKPOINTING_FLAGS:
            if isinstance(getattr(part, flag, None), bool):
                setattr(part, flag, False)
        if has_dcnv3_layers(part):
            parts[path] = part
            if getattr(part, _DCNV4_FLAG, False):
                setattr(part, _DCNV4_FLAG, False)
                through_dcnv4.append(path)
    state = ModelState(model)
    try:
        found = {path: compare_forward(part, path, sampling) for path, part in parts.items()}
    finally:
        state.restore()
    for path, check in found.items():
        if check and check.replaced:
            use_published_forward(parts[path])
        elif check is None and path in through_dcnv4:
            found[path] = SamplingCheck(
                module_source(parts[path], path),
                replaced=True,
                reason=f"{_DCNV4_FLAG}=True lets the CUDA code of DCNv4 compute DCNv3",
            )
    return PreparedModel(model, found)


def _copy_sharing_tensors(module: nn.Module) -> nn.Module:
    memo: dict[int, Any] = {}
    for part in module.modules():
        groups = (part._parameters, part._buffers, vars(part))
        tensors = [t for group in groups for t in group.values() if isinstance(t, Tensor)]
        memo |= {id(tensor): tensor for tensor in tensors}
    try:
        return copy.deepcopy(module, memo)
    except Exception as error:  # raised by whatever objects the model holds
        raise ModelImportError(
            "the model cannot be copied, and the importer must not change the original",
            got=f"{type(error).__name__}: {error}",
            hint="Remove attributes that copy.deepcopy does not support (open files, locks).",
        ) from error
