"""Copy a PyTorch model for export, with its DCNv3 modules calling this library's operator."""

from __future__ import annotations

import copy
from typing import Any, Final, NamedTuple

from torch import Tensor, nn

from dcnv3_tvm.errors import ModelImportError
from dcnv3_tvm.frontend.torch.published_functions import CORE_NAME, FUNCTION_NAME
from dcnv3_tvm.frontend.torch.rebind_sampling import SamplingRebinder
from dcnv3_tvm.frontend.torch.replace_forward import has_dcnv3_layers, replace_forward

_CHECKPOINTING_FLAGS: Final = ("with_cp", "gradient_checkpointing", "use_checkpoint")


class PreparedModel(NamedTuple):
    """A copy of a model, ready for export.

    Parameters
    ----------
    model : nn.Module
        In inference mode; shares its tensors with the original.
    dcnv3_modules : tuple of str
        Paths of the modules that call the operator.
    """

    model: nn.Module
    dcnv3_modules: tuple[str, ...]


def prepare_model(module: nn.Module) -> PreparedModel:
    """Copy `module` without its tensors and make its DCNv3 modules call the operator.

    Parameters
    ----------
    module : nn.Module
        Any module that contains DCNv3 modules. It is not changed.

    Raises
    ------
    ModelImportError
        If there is no DCNv3 module, or one does not compute the published operator.
    """
    model = _copy_sharing_tensors(module)
    rebinder = SamplingRebinder()
    found = []
    for path, part in model.named_modules():
        # Not model.eval(): train() of the published detection class does not return the module.
        part.training = False
        for flag in _CHECKPOINTING_FLAGS:
            if isinstance(getattr(part, flag, None), bool):
                setattr(part, flag, False)
        if rebinder.rebind(part):
            found.append(path)
        elif has_dcnv3_layers(part):
            replace_forward(part, path)
            found.append(path)
    if not found:
        raise ModelImportError(
            "the model contains no DCNv3 module",
            got=type(module).__name__,
            allowed="a model with modules that have offset, mask, input_proj and output_proj "
            f"layers, or that call {CORE_NAME} or {FUNCTION_NAME}",
        )
    return PreparedModel(model, tuple(found))


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
