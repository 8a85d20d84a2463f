"""Signatures of compiled functions: names, shapes, dtypes and layouts of inputs and outputs."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import Any, Final

from dcnv3_tvm.spec import DCNv3Params

BATCH: Final = "n"
"""Name of a dynamic batch size."""

MAIN: Final = "main"
"""Name of the entry that returns what the model returns."""

OFFSETS: Final = "offsets"
"""Name of the entry that returns the offset and the mask of each DCNv3, in order."""


def size_name(size: tuple[int, int]) -> str:
    """Return the name of an image size, height first, for example ``"384x640"``."""
    return f"{size[0]}x{size[1]}"


def sized_entry(function: str, size: str) -> str:
    """Return the name of the entry that is a function for a further image size, by its name.

    Examples
    --------
    >>> sized_entry("features", "384x640")
    'features_384x640'
    """
    return f"{function}_{size}"


def function_of(entry: str) -> str:
    """Return the function that an entry is, for whatever image size.

    Examples
    --------
    >>> function_of("features_384x640"), function_of("main")
    ('features', 'main')
    """
    return entry.partition("_")[0]


def parse_size(size: str) -> tuple[int, str]:
    """Return multiple and name of a dynamic input size.

    Examples
    --------
    >>> parse_size("h"), parse_size("32*h")
    ((1, 'h'), (32, 'h'))
    """
    multiple, _, name = size.rpartition("*")
    return int(multiple or 1), name


def is_input_size(size: str) -> bool:
    """Whether a string is a dynamic size as an input may have it.

    Examples
    --------
    >>> is_input_size("32*h"), is_input_size("0*h"), is_input_size("h + 1")
    (True, False, False)
    """
    return re.fullmatch(r"(?:[1-9]\d{0,8}\*)?[A-Za-z_]\w*", size) is not None


def input_layout(shape: Sequence[int | str]) -> str:
    """Return the layout of an input: by its three channels if it has four axes, else empty."""
    if len(shape) != 4:
        return ""
    return "NHWC" if shape[-1] == 3 != shape[1] else "NCHW"


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """One input or output.

    Parameters
    ----------
    name : str
        For example ``"image"``, ``"logits"``, ``"feature_0"``.
    shape : tuple of int or str
        Sizes; a string is a dynamic size (``"n"``). That of an input may be restricted to multiples
        (``"32*h"``), that of an output may be computed from the inputs' (``"8*h"``).
    dtype : str
        Element type.
    layout : str
        One letter for each axis, for example ``"NCHW"``; empty where unknown.
    stride : int or None
        Pixels of the image per pixel of a feature map; None for other tensors.
    """

    name: str
    shape: tuple[int | str, ...]
    dtype: str
    layout: str = ""
    stride: int | None = None

    def describe(self) -> str:
        """Format layout and shape, for example ``NCHW (n, 3, 224, 224)``."""
        shape = ", ".join(str(size) for size in self.shape)
        return f"{self.layout} ({shape})".strip()

    @property
    def spatial_axes(self) -> tuple[int, int]:
        """Axes of height and width of an image: by the layout, else the last two."""
        axes = len(self.shape)
        return (1, 2) if self.layout == "NHWC" else (axes - 2, axes - 1)

    @property
    def image_size(self) -> tuple[int, int] | None:
        """Height and width of an image; None if one is dynamic, or there are no such axes."""
        if len(self.shape) < 4:
            return None
        height, width = (self.shape[axis] for axis in self.spatial_axes)
        return (height, width) if isinstance(height, int) and isinstance(width, int) else None

    def dynamic_sizes(self, shape: Sequence[int]) -> dict[str, int]:
        """Return the values of the names of an input, given its shape.

        Examples
        --------
        >>> TensorInfo("image", ("n", 3, "32*h", "32*w"), "float32").dynamic_sizes((1, 3, 64, 96))
        {'n': 1, 'h': 2, 'w': 3}
        """
        named = [
            (size, *parse_size(expected))
            for size, expected in zip(shape, self.shape, strict=True)
            if isinstance(expected, str)
        ]
        return {name: size // multiple for size, multiple, name in named}

    def kernel_shape(self, shape: Sequence[int | str]) -> tuple[int | str, ...]:
        """Return the shape in which compiled code takes an input, given its shape.

        An axis of size ``"32*h"`` is taken as two, of sizes ``h`` and 32: then all sizes in the
        model are computed from ``h``, without divisions that would have to leave no remainder.
        """
        sizes: list[int | str] = []
        for size, expected in zip(shape, self.shape, strict=True):
            multiple, name = parse_size(expected) if isinstance(expected, str) else (1, "")
            if multiple == 1:
                sizes.append(size)
            else:
                sizes += [name if isinstance(size, str) else size // multiple, multiple]
        return tuple(sizes)

    def to_json(self) -> dict[str, Any]:
        """Return plain values for ``json.dumps``."""
        return dataclasses.asdict(self) | {"shape": list(self.shape)}


@dataclasses.dataclass(frozen=True)
class ExposedBlock:
    """A DCNv3 whose offset and mask an entry returns.

    Parameters
    ----------
    params : DCNv3Params
        Its parameters; the mask that is returned holds weights, after the softmax.
    size : tuple of int or str
        Height and width of its input; a string is computed from the dynamic sizes of the model's
        inputs (`TensorInfo.dynamic_sizes`), for example ``"(h + 1) // 2"``.
    """

    params: DCNv3Params
    size: tuple[int | str, ...]


@dataclasses.dataclass(frozen=True)
class Entry:
    """One callable function of a model: ``main``, ``features`` or ``offsets``.

    In a model of several image sizes, each further size has entries of its own, such as
    ``main_384x640`` (`sized_entry`).

    Parameters
    ----------
    inputs, outputs : tuple of TensorInfo
        In call order.
    weights : tuple of str
        Names of the weights that follow the inputs, in call order.
    blocks : tuple of ExposedBlock
        For ``offsets``, the DCNv3 whose offset and mask the outputs are, in turn.
    """

    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]
    weights: tuple[str, ...] = ()
    blocks: tuple[ExposedBlock, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return plain values for ``json.dumps``."""
        data: dict[str, Any] = {
            "inputs": [tensor.to_json() for tensor in self.inputs],
            "outputs": [tensor.to_json() for tensor in self.outputs],
            "weights": list(self.weights),
        }
        if self.blocks:
            data["blocks"] = [dataclasses.asdict(block) for block in self.blocks]
        return data
