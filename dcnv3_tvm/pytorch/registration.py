"""What the PyTorch operators of DCNv3 share: schema, checks, element types, batches of vmap."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Final

import torch

from dcnv3_tvm.dtypes import DTYPE_BYTES
from dcnv3_tvm.errors import InvalidArgumentError
from dcnv3_tvm.spec import DCNv3Keywords, DCNv3Params, DCNv3Spec

if TYPE_CHECKING:
    from typing_extensions import Unpack

_CONSTRAIN: Final[Callable[[Any, Callable[[], str]], None]] = torch._check
_NAMESPACE: Final = "dcnv3_tvm"
_SCHEMA_TYPES: Final = {int: "int", tuple: "int[2]", float: "float", bool: "bool"}


def register(
    name: str,
    tensors: Sequence[str],
    results: int,
    compute: Callable[..., Any],
    fake: Callable[..., Any],
    backward: Callable[..., tuple[torch.Tensor | None, ...]],
) -> Callable[..., Any]:
    """Register a differentiable operator, with the names and defaults of `DCNv3Params`.

    Parameters
    ----------
    name : str
        Its name in ``torch.ops.dcnv3_tvm``.
    tensors : sequence of str
        Names of its tensor arguments. The batch is the first dimension of each, and of the results.
    results : int
        Number of its results, which are tensors.
    compute : callable
        Implementation on CPUs and GPUs.
    fake : callable
        Implementation for tensors without data.
    backward : callable
        Given a context and the gradients of the results, returns those of the tensors. The context
        holds the tensors as ``saved_tensors`` and the keyword arguments as ``params``.

    Returns
    -------
    callable
        Calls the operator, also in transforms of ``torch.func``, for which PyTorch does not
        support what ``register_autograd`` registers.
    """

    def save(ctx: Any, inputs: Any, keyword_only_inputs: Any, output: Any) -> None:  # noqa: ARG001
        ctx.save_for_backward(*inputs)
        ctx.params = keyword_only_inputs

    qualified = f"{_NAMESPACE}::{name}"
    # The process-wide registry of operators outlives a reload of the module that registers.
    if not hasattr(getattr(torch.ops, _NAMESPACE), name):
        torch.library.define(
            qualified, schema(tensors, results), tags=(torch.Tag.pt2_compliant_tag,)
        )
        torch.library.impl(qualified, ("CPU", "CUDA"))(compute)
        torch.library.register_fake(qualified)(fake)
        torch.library.register_autograd(qualified, backward, setup_context=save)
    operator = getattr(getattr(torch.ops, _NAMESPACE), name)

    class Transformed(torch.autograd.Function):
        """The operator for transforms of ``torch.func``."""

        @staticmethod
        def forward(*arguments: Any) -> Any:
            *inputs, params = arguments
            return operator(*inputs, **params)

        @staticmethod
        def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
            save(ctx, inputs[:-1], inputs[-1], output)

        @staticmethod
        def backward(ctx: Any, *grads: torch.Tensor) -> Any:
            return (*backward(ctx, *grads), None)

        @staticmethod
        def vmap(info: Any, in_dims: Any, *arguments: Any) -> Any:
            *inputs, params = arguments
            size = info.batch_size
            outputs = call(*_fold_batches(size, in_dims[:-1], inputs), **params)
            if results == 1:
                return outputs.unflatten(0, (size, -1)), 0
            return tuple(each.unflatten(0, (size, -1)) for each in outputs), (0,) * results

    def call(*inputs: torch.Tensor, **params: Unpack[DCNv3Keywords]) -> Any:
        if torch._C._are_functorch_transforms_active():
            apply: Callable[..., Any] = Transformed.apply
            return apply(*inputs, params)
        return operator(*inputs, **params)

    return call


def _fold_batches(
    size: int, dims: Sequence[int | None], tensors: Sequence[torch.Tensor]
) -> list[torch.Tensor]:
    """Make one batch of the batches of all `size` calls of a vmap.

    Parameters
    ----------
    size : int
        Number of calls.
    dims : sequence of int or None
        For each tensor the dimension over which it is mapped; None if all calls share it.
    tensors : sequence of torch.Tensor
        Their arguments.
    """
    return [
        (each.expand(size, *each.shape) if dim is None else each.movedim(dim, 0)).flatten(0, 1)
        for each, dim in zip(tensors, dims, strict=True)
    ]


def schema(tensors: Sequence[str], results: int) -> str:
    """Write the schema of an operator, with the names and defaults of `DCNv3Params`."""
    arguments = [*(f"Tensor {each}" for each in tensors), "*"]
    for name, default in DCNv3Params(group=1).keywords().items():
        argument = f"{_SCHEMA_TYPES[type(default)]} {name}"
        if name != "group":
            argument += f"={list(default) if isinstance(default, tuple) else default}"
        arguments.append(argument)
    result = "Tensor" if results == 1 else f"({', '.join(['Tensor'] * results)})"
    return f"({', '.join(arguments)}) -> {result}"


def computed_dtype(
    x: torch.dtype, offset: torch.dtype, mask: torch.dtype, *, softmax: bool = False
) -> torch.dtype:
    """Return the type in which the operator is computed.

    Offsets are not rounded to that of x; weights in the mask may be, but not logits.
    """
    dtype = torch.promote_types(x, offset)
    return torch.promote_types(dtype, mask) if softmax else dtype


def output_shape(
    x: torch.Tensor, offset: torch.Tensor, mask: torch.Tensor, **params: Unpack[DCNv3Keywords]
) -> list[Any]:
    """Check a call on tensors without data and return the shape of its result.

    Raises
    ------
    InvalidArgumentError
        If a dtype, a shape or a parameter is not valid.
    """
    check_dtypes({"x": x, "offset": offset, "mask": mask})
    check_devices({"x": x, "offset": offset, "mask": mask})
    sizes = [size if type(size) is int else None for size in x.shape[:-1]]
    spec = DCNv3Spec.of((*sizes, int(x.shape[-1])), **params)
    leading = [x.shape[0], *(spec.output_extent(x.shape[1 + axis], axis) for axis in range(2))]
    check_shape("offset", offset, [*leading, spec.offset_channels])
    check_shape("mask", mask, [*leading, spec.mask_channels])
    return [*leading, spec.channels]


def check_dtypes(tensors: dict[str, torch.Tensor]) -> None:
    """Check that tensors are of floating-point types."""
    dtypes = {name: tensor.dtype for name, tensor in tensors.items()}
    if not all(str(dtype).removeprefix("torch.") in DTYPE_BYTES for dtype in dtypes.values()):
        raise InvalidArgumentError(
            f"{', '.join(dtypes)}: not all are of floating-point dtypes",
            got=", ".join(f"{name}: {dtype}" for name, dtype in dtypes.items()),
            allowed=", ".join(DTYPE_BYTES),
        )


def check_devices(tensors: dict[str, torch.Tensor]) -> None:
    """Check that tensors are on one device."""
    devices = {name: tensor.device for name, tensor in tensors.items()}
    if len(set(devices.values())) > 1:
        raise InvalidArgumentError(
            "the tensors are on different devices",
            got=", ".join(f"{name}: {device}" for name, device in devices.items()),
            allowed="the same for all",
        )


def check_shape(name: str, tensor: torch.Tensor, expected: list[Any]) -> None:
    """Check the shape of a tensor; a dynamic size becomes a constraint of the traced program."""
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
        _CONSTRAIN(a == b, lambda: f"{name} has shape {got} where {expected} is needed")
