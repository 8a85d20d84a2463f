"""DCNv3 as a PyTorch operator: ``torch.ops.dcnv3_tvm.dcnv3``.

Importing the module registers the operator once. It runs this library's kernel on the memory of the
tensors (through DLPack, without copying contiguous tensors), on the CPU or GPU that holds them. Its
fake implementation makes it work in ``torch.compile(fullgraph=True)`` and ``torch.export``.

The element types of the arguments may differ, as autocast makes them: the operator is computed in
the wider type of x and offset, and the result has the type of x. Autocast does not cast its inputs.

The operator is for inference and has no gradient. It accepts tensors that require one; the backward
pass raises `InvalidArgumentError`. ``torch.compile`` traces the backward pass ahead of time and
raises at once, so compile under ``torch.no_grad()``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

import torch

from dcnv3_tvm.compiler import functional
from dcnv3_tvm.dtypes import DTYPE_BYTES
from dcnv3_tvm.errors import InvalidArgumentError
from dcnv3_tvm.spec import DCNv3Keywords, DCNv3Params, DCNv3Spec

if TYPE_CHECKING:
    from typing_extensions import Unpack

OP_NAME: Final = "dcnv3_tvm::dcnv3"

_CONSTRAIN: Final[Callable[[Any, Callable[[], str]], None]] = torch._check
_SCHEMA_TYPES: Final = {int: "int", tuple: "int[2]", float: "float", bool: "bool"}


def dcnv3(
    x: torch.Tensor, offset: torch.Tensor, mask: torch.Tensor, **params: Unpack[DCNv3Keywords]
) -> torch.Tensor:
    """Call ``torch.ops.dcnv3_tvm.dcnv3``.

    Parameters
    ----------
    x, offset, mask : torch.Tensor
        Shapes (N, H, W, C), (N, Ho, Wo, group*P*2) and (N, Ho, Wo, group*P), of floating-point
        dtypes.
    **params
        As for `dcnv3_tvm.spec.DCNv3Params`.

    Returns
    -------
    torch.Tensor
        Shape (N, Ho, Wo, C), contiguous, of the dtype of x.

    Raises
    ------
    InvalidArgumentError
        If a shape, a dtype or a parameter is not valid.

    Examples
    --------
    >>> import torch
    >>> from dcnv3_tvm.pytorch.operator import dcnv3
    >>> x, mask = torch.rand(1, 6, 5, 8), torch.rand(1, 6, 5, 18)
    >>> dcnv3(x, torch.zeros(1, 6, 5, 36), mask, group=2).shape
    torch.Size([1, 6, 5, 8])
    """
    result: torch.Tensor = torch.ops.dcnv3_tvm.dcnv3(x, offset, mask, **params)
    return result


def computed_dtype(
    x: torch.dtype, offset: torch.dtype, mask: torch.dtype, *, softmax: bool = False
) -> torch.dtype:
    """Return the type in which the operator is computed.

    Offsets are not rounded to that of x; weights in the mask may be, but not logits.
    """
    dtype = torch.promote_types(x, offset)
    return torch.promote_types(dtype, mask) if softmax else dtype


def _compute(
    x: torch.Tensor, offset: torch.Tensor, mask: torch.Tensor, **params: Unpack[DCNv3Keywords]
) -> torch.Tensor:
    dtype = computed_dtype(x.dtype, offset.dtype, mask.dtype, softmax=params.get("softmax", False))
    result = functional.dcnv3(x.to(dtype), offset.to(dtype), mask.to(dtype), **params)
    return result.to(x.dtype)


def _fake(
    x: torch.Tensor, offset: torch.Tensor, mask: torch.Tensor, **params: Unpack[DCNv3Keywords]
) -> torch.Tensor:
    """Check the call and allocate its result, for tensors without data."""
    dtypes = {"x": x.dtype, "offset": offset.dtype, "mask": mask.dtype}
    if not all(str(dtype).removeprefix("torch.") in DTYPE_BYTES for dtype in dtypes.values()):
        raise InvalidArgumentError(
            "x, offset and mask are not of floating-point dtypes",
            got=", ".join(f"{name}: {dtype}" for name, dtype in dtypes.items()),
            allowed=", ".join(DTYPE_BYTES),
        )
    sizes = [size if type(size) is int else None for size in x.shape[:-1]]
    spec = DCNv3Spec.of((*sizes, int(x.shape[-1])), **params)
    leading = [x.shape[0], *(spec.output_extent(x.shape[1 + axis], axis) for axis in range(2))]
    _check_shape("offset", offset, [*leading, spec.offset_channels])
    _check_shape("mask", mask, [*leading, spec.mask_channels])
    return x.new_empty([*leading, spec.channels])


def _check_shape(name: str, tensor: torch.Tensor, expected: list[Any]) -> None:
    got = list(tensor.shape)
    mismatch = len(got) != len(expected) or any(
        type(a) is int and type(b) is int and a != b for a, b in zip(got, expected, strict=False)
    )
    if mismatch:
        raise InvalidArgumentError(
            f"{name} does not match x and the parameters",
            got=f"shape {tuple(got)}",
            allowed=f"shape {tuple(expected)}",
        )
    for a, b in zip(got, expected, strict=True):
        # A dynamic size becomes a constraint of the traced program.
        _CONSTRAIN(a == b, lambda: f"{name} has shape {got} where {expected} is needed")


def _raise_in_backward(_context: Any, *_gradients: torch.Tensor) -> None:
    raise InvalidArgumentError(
        "dcnv3_tvm::dcnv3 has no gradient: this library is made for inference",
        hint="Call the model under torch.no_grad(), or train with the original operator.",
    )


def schema() -> str:
    """Write the operator's schema, with the names and defaults of `DCNv3Params`."""
    arguments = ["Tensor x", "Tensor offset", "Tensor mask", "*"]
    for name, default in DCNv3Params(group=1).keywords().items():
        argument = f"{_SCHEMA_TYPES[type(default)]} {name}"
        if name != "group":
            argument += f"={list(default) if isinstance(default, tuple) else default}"
        arguments.append(argument)
    return f"({', '.join(arguments)}) -> Tensor"


def _register() -> None:
    # The process-wide registry of operators outlives a reload of this module.
    if hasattr(torch.ops.dcnv3_tvm, "dcnv3"):
        return
    torch.library.define(OP_NAME, schema(), tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.impl(OP_NAME, ("CPU", "CUDA"))(_compute)
    torch.library.register_fake(OP_NAME)(_fake)
    torch.library.register_autograd(OP_NAME, _raise_in_backward)


_register()
