"""A call of a published sampling function: its tensors and the operator's parameters."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from dcnv3_tvm.errors import InvalidArgumentError
from dcnv3_tvm.pytorch.published_extension import published_params
from dcnv3_tvm.spec import DCNv3Params, DCNv3Spec

CORE_NAME: Final = "dcnv3_core_pytorch"
"""The published fallback in PyTorch."""

FUNCTION_NAME: Final = "DCNv3Function"
"""The published autograd function around the CUDA extension."""

CORE_SIGNATURE: Final = (
    f"{CORE_NAME}(input, offset, mask, kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, "
    "dilation_h, dilation_w, group, group_channels, offset_scale, remove_center)"
)


class PublishedCall(NamedTuple):
    """A call of a function with the published arguments.

    Parameters
    ----------
    owner : object
        What precedes the tensors: the autograd context, or the object of a method.
    x, offset, mask : torch.Tensor
        Channels-last, as for the operator.
    params : DCNv3Params
        The parameters of the operator.
    """

    owner: object
    x: Tensor
    offset: Tensor
    mask: Tensor
    params: DCNv3Params

    @classmethod
    def parse(
        cls,
        signature: inspect.Signature,
        arguments: Sequence[Any],
        keywords: Mapping[str, Any],
        *,
        has_step: bool,
    ) -> PublishedCall | None:
        """Return the call, or None if its arguments are not the published ones.

        Parameters
        ----------
        signature : inspect.Signature
            Of the called function.
        arguments, keywords
            Of the call.
        has_step : bool
            Whether ``im2col_step`` precedes ``remove_center``.
        """
        bound = signature.bind(*arguments, **keywords)
        bound.apply_defaults()
        values = [*bound.args, *bound.kwargs.values()]
        owner = None if not values or isinstance(values[0], Tensor) else values.pop(0)
        tensors, numbers = values[:3], values[3:]
        if has_step:
            del numbers[11:12]
        if (
            len(tensors) < 3
            or not all(isinstance(each, Tensor) and each.ndim == 4 for each in tensors)
            or len(numbers) not in (11, 12)  # the oldest version has no remove_center
            or not all(isinstance(each, Real) for each in numbers)
        ):
            return None
        try:
            params = published_params(*numbers)
        except InvalidArgumentError:
            return None
        return cls(owner, tensors[0], tensors[1], tensors[2], params)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of x; those of the example, where they are dynamic."""
        height, width = (
            int(size.node.hint) if isinstance(size, torch.SymInt) else int(size)
            for size in self.x.shape[1:3]
        )
        return height, width

    @property
    def is_dynamic(self) -> bool:
        """Whether a size of x is dynamic."""
        return not all(type(size) is int for size in self.x.shape)

    @property
    def output_size(self) -> tuple[Any, Any]:
        """Height and width of the result; may be symbolic."""
        height, width = (self.params.output_extent(self.x.shape[1 + axis], axis) for axis in (0, 1))
        return height, width

    def has_matching_sizes(self) -> bool:
        """Whether offset and mask have the size of the result; true where that is not known."""
        return all(
            not (type(got) is int and type(expected) is int) or got == expected
            for tensor in (self.offset, self.mask)
            for got, expected in zip(tensor.shape[1:3], self.output_size, strict=True)
        )

    def spec(self, batch: int, height: int, width: int) -> DCNv3Spec:
        """Return the problem of this call for another batch and size."""
        shape = (batch, height, width, int(self.x.shape[-1]))
        return DCNv3Spec.of(shape, dtype="float64", **self.params.keywords())
