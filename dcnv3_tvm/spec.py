"""Parameters of the DCNv3 operator, and the specification of one DCNv3 problem."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final, TypedDict, cast

from dcnv3_tvm.checks import boolean, finite, integer, pair
from dcnv3_tvm.dtypes import DTYPE_BYTES
from dcnv3_tvm.errors import InvalidArgumentError
from dcnv3_tvm.spec_slug import format_slug, parse_slug

if TYPE_CHECKING:
    from typing_extensions import Unpack

MAX_KERNEL: Final = 15
"""Largest kernel extent; the kernels unroll the loop over the points."""


class _RequiredKeywords(TypedDict):
    group: int


class DCNv3Keywords(_RequiredKeywords, total=False):
    """Keyword arguments of `DCNv3Params`, for functions that pass them on."""

    kernel_size: int | Sequence[int]
    stride: int | Sequence[int]
    pad: int | Sequence[int]
    dilation: int | Sequence[int]
    offset_scale: float
    remove_center: bool
    softmax: bool


@dataclasses.dataclass(frozen=True, init=False)
class DCNv3Params:
    """Parameters of the DCNv3 operator: everything but tensor sizes and element type.

    Parameters
    ----------
    group : int
        Number of groups of channels, each with its own offsets and mask.
    kernel_size, stride, pad, dilation : int or (int, int)
        As in a convolution; pairs are (height, width). Padding is virtual: samples outside the
        input are zero.
    offset_scale : float
        Factor on both the regular grid and the learned offsets.
    remove_center : bool
        Leave out the central kernel point; needs an odd kernel.
    softmax : bool
        Whether ``mask`` holds logits, to which the operator applies a softmax over the P points.

    Raises
    ------
    InvalidArgumentError
        If a value is out of range or has the wrong type.

    Examples
    --------
    >>> params = DCNv3Params(group=4, remove_center=True)
    >>> params.kernel_size, params.points, params.mask_channels
    ((3, 3), 8, 32)
    """

    group: int
    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    pad: tuple[int, int]
    dilation: tuple[int, int]
    offset_scale: float
    remove_center: bool
    softmax: bool

    def __init__(
        self,
        *,
        group: int,
        kernel_size: int | Sequence[int] = 3,
        stride: int | Sequence[int] = 1,
        pad: int | Sequence[int] = 1,
        dilation: int | Sequence[int] = 1,
        offset_scale: float = 1.0,
        remove_center: bool = False,
        softmax: bool = False,
    ) -> None:
        self._set(
            group=integer("group", group, low=1),
            kernel_size=pair("kernel_size", kernel_size, low=1, high=MAX_KERNEL),
            stride=pair("stride", stride, low=1),
            pad=pair("pad", pad, low=0),
            dilation=pair("dilation", dilation, low=1),
            offset_scale=finite("offset_scale", offset_scale),
            remove_center=boolean("remove_center", remove_center),
            softmax=boolean("softmax", softmax),
        )
        if not self.remove_center:
            return
        if not all(extent % 2 for extent in self.kernel_size):
            raise InvalidArgumentError(
                "remove_center needs an odd kernel, which has a centre",
                got=f"kernel_size={self.kernel_size}",
                hint="Use an odd kernel_size such as 3, or remove_center=False.",
            )
        if self.points == 0:
            raise InvalidArgumentError(
                "remove_center leaves no point of a 1x1 kernel",
                got=f"kernel_size={self.kernel_size}",
                hint="Use a kernel_size of 3 or more, or remove_center=False.",
            )

    def _set(self, **values: Any) -> None:
        """Assign fields of this frozen class; for constructors."""
        for name, value in values.items():
            object.__setattr__(self, name, value)

    def keywords(self) -> DCNv3Keywords:
        """Return the parameters as the keyword arguments that construct them."""
        return cast("DCNv3Keywords", {name: getattr(self, name) for name in PARAMETERS})

    @functools.cached_property
    def points(self) -> int:
        """Sampling points P of each group at each output pixel."""
        return self.kernel_size[0] * self.kernel_size[1] - int(self.remove_center)

    @functools.cached_property
    def kernel_points(self) -> tuple[tuple[int, int], ...]:
        """(column, row) of every point in the operator's order: column-major."""
        height, width = self.kernel_size
        center = (width // 2, height // 2)
        return tuple(
            (i, j)
            for i in range(width)
            for j in range(height)
            if not (self.remove_center and (i, j) == center)
        )

    @functools.cached_property
    def offset_channels(self) -> int:
        """Channels of offset: an x and a y for each point of each group."""
        return self.group * self.points * 2

    @functools.cached_property
    def mask_channels(self) -> int:
        """Channels of mask: one factor for each point of each group."""
        return self.group * self.points

    def output_extent(self, size: Any, axis: int) -> Any:
        """Return the output extent for an input extent along an axis (0: height, 1: width).

        The input extent may be an integer, or a symbolic expression of PyTorch or TVM.
        """
        window = self.dilation[axis] * (self.kernel_size[axis] - 1) + 1
        return (size + (2 * self.pad[axis] - window)) // self.stride[axis] + 1


PARAMETERS: Final = tuple(field.name for field in dataclasses.fields(DCNv3Params))
"""Names of the parameters, in the order of `DCNv3Params`."""


@dataclasses.dataclass(frozen=True, init=False)
class DCNv3Spec(DCNv3Params):
    """A DCNv3 problem: the operator's parameters, the sizes of its tensors and their element type.

    Tensors are channels-last and contiguous. With ``P = points`` and ``(Ho, Wo) = output_size``:

    ======== ============================================ ==================================
    tensor   shape                                        order of the last axis
    ======== ============================================ ==================================
    x        (batch, height, width, group*group_channels) channel = g*group_channels + c
    offset   (batch, Ho, Wo, group*P*2)                   (g*P + p)*2 + {0: x, 1: y}, pixels
    mask     (batch, Ho, Wo, group*P)                     g*P + p
    output   (batch, Ho, Wo, group*group_channels)        as x
    ======== ============================================ ==================================

    Parameters
    ----------
    batch, height, width : int or None
        Sizes of the input; ``None`` makes a size dynamic. The batch may be empty.
    group_channels : int
        Channels in each group.
    dtype : str
        ``"float64"``, ``"float32"``, ``"float16"`` or ``"bfloat16"``. The half types are
        computed in float32 and rounded once at the store.
    **params
        ``group``, ``kernel_size`` and so on, as for `DCNv3Params`.

    Raises
    ------
    InvalidArgumentError
        If a value is out of range, or the output would be empty.
    """

    batch: int | None
    height: int | None
    width: int | None
    group_channels: int
    dtype: str

    def __init__(
        self,
        *,
        batch: int | None,
        height: int | None,
        width: int | None,
        group_channels: int,
        dtype: str = "float32",
        **params: Unpack[DCNv3Keywords],
    ) -> None:
        super().__init__(**params)
        if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
            raise InvalidArgumentError(
                "dtype is not supported", got=repr(dtype), allowed=", ".join(DTYPE_BYTES)
            )
        self._set(
            batch=None if batch is None else integer("batch", batch, low=0),
            height=None if height is None else integer("height", height, low=1),
            width=None if width is None else integer("width", width, low=1),
            group_channels=integer("group_channels", group_channels, low=1),
            dtype=dtype,
        )
        for axis, extent in zip(("height", "width"), self.output_size, strict=True):
            if extent is not None and extent <= 0:
                raise InvalidArgumentError(
                    f"the output {axis} would be {extent}",
                    got=f"height={self.height}, width={self.width}, kernel_size="
                    f"{self.kernel_size}, pad={self.pad}, dilation={self.dilation}",
                    allowed="size + 2*pad >= dilation*(kernel_size - 1) + 1 on both axes",
                )

    @classmethod
    def of(
        cls,
        shape: Sequence[int | None],
        *,
        dtype: str = "float32",
        **params: Unpack[DCNv3Keywords],
    ) -> DCNv3Spec:
        """Specify the problem for an input of shape (N, H, W, C).

        Parameters
        ----------
        shape : sequence of int or None
            Shape of x; ``None`` makes N, H or W dynamic.
        dtype : str
            Element type of all tensors.
        **params
            As for `DCNv3Params`.

        Examples
        --------
        >>> spec = DCNv3Spec.of((1, 56, 56, 64), group=4)
        >>> spec.slug
        'dcnv3-n1-h56-w56-c64-g4-k3-s1-p1-d1-f32'
        >>> spec.offset_shape
        (1, 56, 56, 72)
        """
        dims = tuple(shape) if hasattr(shape, "__iter__") else ()
        if len(dims) != 4:
            raise InvalidArgumentError(
                "x does not have four dimensions", got=f"shape {shape}", allowed="(N, H, W, C)"
            )
        batch, height, width, channels = dims
        group = DCNv3Params(**params).group
        if channels is None or integer("channels", channels, low=0) % group or channels < 1:
            raise InvalidArgumentError(
                f"the {channels} channels of x cannot be divided into {group} groups",
                got=f"shape {dims}",
                allowed="(N, H, W, C) with C a multiple of group",
                hint="NHWC is expected: an NCHW tensor needs x.permute(0, 2, 3, 1).contiguous().",
            )
        return cls(
            batch=batch,
            height=height,
            width=width,
            group_channels=channels // group,
            dtype=dtype,
            **params,
        )

    @functools.cached_property
    def params(self) -> DCNv3Params:
        """The parameters alone."""
        return DCNv3Params(**self.keywords())

    @functools.cached_property
    def channels(self) -> int:
        """Channels of input and output: ``group * group_channels``."""
        return self.group * self.group_channels

    @functools.cached_property
    def output_size(self) -> tuple[int | None, int | None]:
        """(Ho, Wo); ``None`` where the input size is dynamic."""
        height, width = (
            None if size is None else self.output_extent(size, axis)
            for axis, size in enumerate((self.height, self.width))
        )
        return height, width

    @functools.cached_property
    def is_static(self) -> bool:
        """Whether batch, height and width are fixed."""
        return None not in (self.batch, self.height, self.width)

    @functools.cached_property
    def input_shape(self) -> tuple[int | None, ...]:
        """Shape of x."""
        return (self.batch, self.height, self.width, self.channels)

    @functools.cached_property
    def offset_shape(self) -> tuple[int | None, ...]:
        """Shape of offset."""
        return (self.batch, *self.output_size, self.offset_channels)

    @functools.cached_property
    def mask_shape(self) -> tuple[int | None, ...]:
        """Shape of mask."""
        return (self.batch, *self.output_size, self.mask_channels)

    @functools.cached_property
    def output_shape(self) -> tuple[int | None, ...]:
        """Shape of the result."""
        return (self.batch, *self.output_size, self.channels)

    @functools.cached_property
    def accumulate_dtype(self) -> str:
        """Element type of coordinates, weights and sums."""
        return "float64" if self.dtype == "float64" else "float32"

    @functools.cached_property
    def flops(self) -> int:
        """Floating-point operations of sampling and summation (a multiply-add counts as two).

        Four corners for every point and channel; coordinate arithmetic, shared by the channels of
        a group, is not counted.
        """
        return self.flops_per_output * self._elements(self.output_shape)

    @property
    def flops_per_output(self) -> int:
        """Operations as in `flops` for an element of the result, also with dynamic sizes."""
        return 2 * 4 * self.points

    @functools.cached_property
    def bytes(self) -> int:
        """Least memory traffic: every input read once, the output written once."""
        shapes = (self.input_shape, self.offset_shape, self.mask_shape, self.output_shape)
        return DTYPE_BYTES[self.dtype] * sum(self._elements(shape) for shape in shapes)

    @functools.cached_property
    def gradient_flops(self) -> int:
        """Operations of the gradients: those of x, and those of offset and mask, like `flops`."""
        return 2 * self.flops

    @functools.cached_property
    def gradient_bytes(self) -> int:
        """Least memory traffic of the gradients: as `bytes`, and a gradient of every input."""
        shapes = (self.input_shape, self.offset_shape, self.mask_shape)
        return self.bytes + DTYPE_BYTES[self.dtype] * sum(map(self._elements, shapes))

    @functools.cached_property
    def slug(self) -> str:
        """Short unique name, used for test ids, records and benchmark cases."""
        return format_slug(self.input_shape, self.keywords(), self.dtype)

    @classmethod
    def from_slug(cls, slug: str) -> DCNv3Spec:
        """Parse a `slug`.

        Parameters
        ----------
        slug : str
            As `slug` returns it; offset_scale has as many digits as the slug shows.

        Raises
        ------
        InvalidArgumentError
            If it is not a slug, or a value in it is out of range.

        Examples
        --------
        >>> DCNv3Spec.from_slug("dcnv3-n1-h56-w56-c64-g4-k3-s1-p1-d1-f16").group_channels
        16
        """
        shape, params, dtype = parse_slug(slug)
        return cls.of(shape, dtype=dtype, **params)

    def to_json(self) -> dict[str, Any]:
        """Return plain values for ``json.dumps``."""
        # Tuning records are keyed by a hash that includes this order.
        first = ("batch", "height", "width", "group", "group_channels")
        return {name: getattr(self, name) for name in first} | dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> DCNv3Spec:
        """Restore a specification from the values of `to_json`."""
        return cls(**data)

    def _elements(self, shape: tuple[int | None, ...]) -> int:
        if not self.is_static:
            raise InvalidArgumentError(
                "costs are defined only for a static problem",
                got=self.slug,
                hint="Give batch, height and width.",
            )
        return math.prod(size for size in shape if size is not None)
