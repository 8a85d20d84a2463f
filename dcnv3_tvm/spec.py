"""The one description of a DCNv3 problem, shared by operator, schedules, tuning and benchmarks."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Sequence
from typing import Any, Final

from dcnv3_tvm.dtypes import DTYPE_BYTES
from dcnv3_tvm.errors import InvalidArgumentError

_DTYPE_SLUGS: Final = {"float64": "f64", "float32": "f32", "float16": "f16", "bfloat16": "bf16"}

MAX_KERNEL: Final = 15
"""Largest kernel extent accepted; the kernels unroll over the points."""


def pair(value: int | Sequence[int], name: str) -> tuple[int, int]:
    """Expand ``3`` or ``(3, 5)`` to ``(height, width)``.

    Raises
    ------
    InvalidArgumentError
        If `value` is neither one integer nor a pair of integers.
    """
    values = tuple(value) if isinstance(value, Sequence) else (value, value)
    if len(values) != 2 or not all(_is_int(v) for v in values):
        raise InvalidArgumentError(
            f"{name} is not an integer or a (height, width) pair",
            got=repr(value),
            allowed=f"{name}=3 or {name}=(3, 5)",
        )
    return int(values[0]), int(values[1])


def _is_int(value: Any) -> bool:
    return hasattr(value, "__index__") and not isinstance(value, bool)


_SLUG: Final = re.compile(
    r"dcnv3-n(?P<n>\d+|any)-h(?P<h>\d+|any)-w(?P<w>\d+|any)-c(?P<c>\d+)-g(?P<g>\d+)"
    r"-k(?P<k>\d+(?:x\d+)?)-s(?P<s>\d+(?:x\d+)?)-p(?P<p>\d+(?:x\d+)?)-d(?P<d>\d+(?:x\d+)?)"
    r"(?:-o(?P<o>[-+.\de]+?))?(?P<rc>-rc)?(?P<softmax>-softmax)?-(?P<dtype>f64|f32|f16|bf16)"
)


@dataclasses.dataclass(frozen=True)
class DCNv3Spec:
    """A DCNv3 forward problem: sizes, parameters and element type.

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
        Sizes of the input; ``None`` leaves a size symbolic (known only at run time).
    group, group_channels : int
        Number of groups, and channels in each.
    kernel_size, stride, pad, dilation : (int, int)
        (height, width) pairs, as in a convolution. Padding is virtual: reads outside are zero.
    offset_scale : float
        Factor on the regular grid and on the learned offsets alike.
    remove_center : bool
        Leave the central kernel point out; needs an odd kernel.
    softmax : bool
        ``mask`` holds logits, and the operator applies the softmax over the P points itself.
    dtype : str
        ``"float64"``, ``"float32"``, ``"float16"`` or ``"bfloat16"``. The half types are
        computed in float32 and rounded once at the store.

    Raises
    ------
    InvalidArgumentError
        If a value is out of range, or the output would be empty.
    """

    batch: int | None
    height: int | None
    width: int | None
    group: int
    group_channels: int
    kernel_size: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (1, 1)
    pad: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    offset_scale: float = 1.0
    remove_center: bool = False
    softmax: bool = False
    dtype: str = "float32"

    def __post_init__(self) -> None:
        self._check_integers()
        if self.dtype not in DTYPE_BYTES:
            raise InvalidArgumentError(
                "dtype is not supported", got=repr(self.dtype), allowed=", ".join(DTYPE_BYTES)
            )
        if not math.isfinite(self.offset_scale):
            raise InvalidArgumentError(
                "offset_scale is not a finite number", got=repr(self.offset_scale)
            )
        kernel_height, kernel_width = self.kernel_size
        if self.remove_center and not (kernel_height % 2 and kernel_width % 2):
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
        for axis, size in zip(("height", "width"), self.output_size, strict=True):
            if size is not None and size <= 0:
                raise InvalidArgumentError(
                    f"the output {axis} would be {size}",
                    got=f"height={self.height}, width={self.width}, kernel_size="
                    f"{self.kernel_size}, pad={self.pad}, dilation={self.dilation}",
                    allowed="size + 2*pad >= dilation*(kernel_size - 1) + 1 on both axes",
                )

    def _check_integers(self) -> None:
        bounds: list[tuple[str, Any, int, int | None]] = [
            ("group", self.group, 1, None),
            ("group_channels", self.group_channels, 1, None),
        ]
        sizes = (("batch", self.batch), ("height", self.height), ("width", self.width))
        bounds += [(name, size, 1, None) for name, size in sizes if size is not None]
        for name, low, high in (
            ("kernel_size", 1, MAX_KERNEL),
            ("stride", 1, None),
            ("pad", 0, None),
            ("dilation", 1, None),
        ):
            values = getattr(self, name)
            if not isinstance(values, tuple) or len(values) != 2:
                raise InvalidArgumentError(
                    f"{name} is not a (height, width) pair",
                    got=repr(values),
                    hint="DCNv3Spec.of(...) also takes a single integer.",
                )
            bounds += [(name, value, low, high) for value in values]
        for name, value, low, high in bounds:
            if not _is_int(value) or value < low or (high is not None and value > high):
                upper = "" if high is None else f" and at most {high}"
                raise InvalidArgumentError(
                    f"{name} is out of range",
                    got=repr(value),
                    allowed=f"an integer of at least {low}{upper}",
                )

    @classmethod
    def of(
        cls,
        shape: Sequence[int | None],
        *,
        group: int,
        kernel_size: int | Sequence[int] = 3,
        stride: int | Sequence[int] = 1,
        pad: int | Sequence[int] = 1,
        dilation: int | Sequence[int] = 1,
        offset_scale: float = 1.0,
        remove_center: bool = False,
        softmax: bool = False,
        dtype: str = "float32",
    ) -> DCNv3Spec:
        """Describe the problem for an input of shape (N, H, W, C).

        Examples
        --------
        >>> spec = DCNv3Spec.of((1, 56, 56, 64), group=4)
        >>> spec.slug
        'dcnv3-n1-h56-w56-c64-g4-k3-s1-p1-d1-f32'
        >>> spec.offset_shape
        (1, 56, 56, 72)
        """
        dims = tuple(shape)
        if len(dims) != 4:
            raise InvalidArgumentError(
                "x does not have four dimensions", got=f"shape {dims}", allowed="(N, H, W, C)"
            )
        batch, height, width, channels = dims
        if not _is_int(group) or group < 1:
            raise InvalidArgumentError(
                "group is out of range", got=repr(group), allowed="an integer of at least 1"
            )
        if channels is None or channels < 1 or channels % group:
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
            group=group,
            group_channels=channels // group,
            kernel_size=pair(kernel_size, "kernel_size"),
            stride=pair(stride, "stride"),
            pad=pair(pad, "pad"),
            dilation=pair(dilation, "dilation"),
            offset_scale=float(offset_scale),
            remove_center=bool(remove_center),
            softmax=bool(softmax),
            dtype=dtype,
        )

    @functools.cached_property
    def channels(self) -> int:
        """Channels of input and output: ``group * group_channels``."""
        return self.group * self.group_channels

    @functools.cached_property
    def points(self) -> int:
        """Sampling points P of each group at each output pixel."""
        return self.kernel_size[0] * self.kernel_size[1] - int(self.remove_center)

    @functools.cached_property
    def kernel_points(self) -> tuple[tuple[int, int], ...]:
        """(column, row) of every point in the operator's order: column first."""
        height, width = self.kernel_size
        centre = (width // 2, height // 2)
        return tuple(
            (i, j)
            for i in range(width)
            for j in range(height)
            if not (self.remove_center and (i, j) == centre)
        )

    @functools.cached_property
    def output_size(self) -> tuple[int | None, int | None]:
        """(Ho, Wo); ``None`` where the input size is symbolic."""
        height, width = (
            None if size is None else self.output_extent(size, axis)
            for axis, size in enumerate((self.height, self.width))
        )
        return height, width

    def output_extent(self, size: Any, axis: int) -> Any:
        """Return the output's extent for an input of `size` along an axis (0: height, 1: width).

        The size may be a number, or a symbol of PyTorch or TVM.
        """
        extent = self.dilation[axis] * (self.kernel_size[axis] - 1) + 1
        return (size + (2 * self.pad[axis] - extent)) // self.stride[axis] + 1

    @functools.cached_property
    def is_static(self) -> bool:
        """Whether batch, height and width are all known."""
        return None not in (self.batch, self.height, self.width)

    @functools.cached_property
    def input_shape(self) -> tuple[int | None, ...]:
        """Shape of x."""
        return (self.batch, self.height, self.width, self.channels)

    @functools.cached_property
    def offset_shape(self) -> tuple[int | None, ...]:
        """Shape of offset."""
        return (self.batch, *self.output_size, self.group * self.points * 2)

    @functools.cached_property
    def mask_shape(self) -> tuple[int | None, ...]:
        """Shape of mask."""
        return (self.batch, *self.output_size, self.group * self.points)

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
        """Floating-point operations of the sampling and the sum (a multiply-add counts as two).

        Four corners for every point and channel; the coordinates, shared by the channels of a
        group, are left out.
        """
        return 2 * 4 * self.points * self._elements(self.output_shape)

    @functools.cached_property
    def bytes(self) -> int:
        """Least traffic: every input read once, the output written once."""
        shapes = (self.input_shape, self.offset_shape, self.mask_shape, self.output_shape)
        return DTYPE_BYTES[self.dtype] * sum(self._elements(shape) for shape in shapes)

    @functools.cached_property
    def slug(self) -> str:
        """Short unique name, used for test ids, records and benchmark cases."""

        def extent(values: tuple[int, int]) -> str:
            return str(values[0]) if values[0] == values[1] else f"{values[0]}x{values[1]}"

        def size(value: int | None) -> str:
            return "any" if value is None else str(value)

        parts = [
            "dcnv3",
            f"n{size(self.batch)}",
            f"h{size(self.height)}",
            f"w{size(self.width)}",
            f"c{self.channels}",
            f"g{self.group}",
            f"k{extent(self.kernel_size)}",
            f"s{extent(self.stride)}",
            f"p{extent(self.pad)}",
            f"d{extent(self.dilation)}",
        ]
        if self.offset_scale != 1.0:
            parts.append(f"o{self.offset_scale:g}")
        if self.remove_center:
            parts.append("rc")
        if self.softmax:
            parts.append("softmax")
        parts.append(_DTYPE_SLUGS[self.dtype])
        return "-".join(parts)

    @classmethod
    def from_slug(cls, slug: str) -> DCNv3Spec:
        """Read a `slug` back.

        Parameters
        ----------
        slug : str
            As `slug` gives it; offset_scale has as many digits as there are in it.

        Raises
        ------
        InvalidArgumentError
            If it is no slug, or a value in it is out of range.

        Examples
        --------
        >>> DCNv3Spec.from_slug("dcnv3-n1-h56-w56-c64-g4-k3-s1-p1-d1-f16").group_channels
        16
        """
        match = _SLUG.fullmatch(slug)
        if match is None:
            raise InvalidArgumentError(
                "this names no operator",
                got=repr(slug),
                allowed="a slug such as dcnv3-n1-h56-w56-c64-g4-k3-s1-p1-d1-f32",
            )

        def size(name: str) -> int | None:
            return None if match[name] == "any" else int(match[name])

        def extent(name: str) -> tuple[int, int]:
            first, _, second = match[name].partition("x")
            return int(first), int(second or first)

        channels, group = int(match["c"]), int(match["g"])
        if group == 0 or channels % group:
            raise InvalidArgumentError(
                "the channels do not divide into the groups", got=f"c{channels}-g{group} in {slug}"
            )
        return cls(
            batch=size("n"),
            height=size("h"),
            width=size("w"),
            group=group,
            group_channels=channels // group,
            kernel_size=extent("k"),
            stride=extent("s"),
            pad=extent("p"),
            dilation=extent("d"),
            offset_scale=float(match["o"] or 1.0),
            remove_center=bool(match["rc"]),
            softmax=bool(match["softmax"]),
            dtype={short: name for name, short in _DTYPE_SLUGS.items()}[match["dtype"]],
        )

    def _elements(self, shape: tuple[int | None, ...]) -> int:
        if not self.is_static:
            raise InvalidArgumentError(
                "a cost is known only for a static problem",
                got=self.slug,
                hint="Give batch, height and width.",
            )
        return math.prod(size for size in shape if size is not None)
