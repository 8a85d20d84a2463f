"""Copy a PyTorch model for export, with its DCNv3 modules calling this library's operator."""

from __future__ import annotations

import copy
from typing import Any, Final, NamedTuple

from torch import Tensor, nn

from dcnv3_tvm.errors import ModelImportError
from dcnv3_tvm.frontend.torch.replace_forward import has_dcnv3_layers, replace_forward
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
    found = {}
    for path, part in model.named_modules():
        # Not model.eval(): train() of the published detection class does not return the module.
        part.training = False
        for flag in _CHECKPOINTING_FLAGS:
            if isinstance(getattr(part, flag, None), bool):
                setattr(part, flag, False)
        if has_dcnv3_layers(part):
            through_dcnv4 = bool(getattr(part, _DCNV4_FLAG, False))
            if through_dcnv4:
                setattr(part, _DCNV4_FLAG, False)
            found[path] = replace_forward(part, path, sampling)
            if through_dcnv4 and found[path] is None:
                found[path] = SamplingCheck(
                    f"{path} ({type(part).__module__}.{type(part).__name__})".lstrip(),
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
