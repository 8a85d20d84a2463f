"""Check the arguments of `import_model`."""

from __future__ import annotations

import torch
from torch import nn

from dcnv3_tvm.errors import InvalidArgumentError, ModelImportError


def unwrap(module: nn.Module) -> nn.Module:
    """Return the model inside the wrappers of torch.compile and data parallelism.

    Raises
    ------
    InvalidArgumentError
        If `module` is not a module.
    ModelImportError
        If it is or has a TorchScript module.
    """
    if not isinstance(module, nn.Module):
        raise InvalidArgumentError(
            "module is not a PyTorch model", got=type(module).__name__, allowed="a torch.nn.Module"
        )
    if isinstance(module, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        return unwrap(module.module)
    for path, part in module.named_modules():
        if isinstance(part, torch.jit.ScriptModule):
            raise ModelImportError(
                "TorchScript modules cannot be imported",
                got=f"{type(part).__name__}{f' {path}' if path else ''}",
                hint="Import the Python module that it was made from.",
            )
    original = getattr(module, "_orig_mod", None)
    return unwrap(original) if isinstance(original, nn.Module) else module


def check_weights(module: nn.Module) -> None:
    """Check that all weights are allocated and float32.

    Raises
    ------
    ModelImportError
        If one is not.
    """
    for name, weight in (*module.named_parameters(), *module.named_buffers()):
        if weight.is_meta:
            raise ModelImportError(
                "the model has shapes but no weights",
                got=f"{name} on the meta device",
                hint="Build the model on the CPU and load a checkpoint.",
            )
        if weight.is_floating_point() and weight.dtype != torch.float32:
            raise ModelImportError(
                "the model is not float32",
                got=f"{name}: {weight.dtype}",
                allowed="float32 weights",
                hint="Import model.float(), and choose the dtype when compiling.",
            )
