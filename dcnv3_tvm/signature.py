"""Signatures of compiled functions: names, shapes, dtypes and layouts of inputs and outputs."""

from __future__ import annotations

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """One input or output.

    Parameters
    ----------
    name : str
        For example ``"image"``, ``"logits"``, ``"feature_0"``.
    shape : tuple of int or str
        Sizes; a string names a dynamic size (``"n"``).
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

    def to_json(self) -> dict[str, Any]:
        """Return plain values for ``json.dumps``."""
        return dataclasses.asdict(self) | {"shape": list(self.shape)}


@dataclasses.dataclass(frozen=True)
class Entry:
    """One callable function of a model: ``main``, or ``features``.

    Parameters
    ----------
    inputs, outputs : tuple of TensorInfo
        In call order.
    weights : tuple of str
        Names of the weights that follow the inputs, in call order.
    """

    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]
    weights: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return plain values for ``json.dumps``."""
        return {
            "inputs": [tensor.to_json() for tensor in self.inputs],
            "outputs": [tensor.to_json() for tensor in self.outputs],
            "weights": list(self.weights),
        }
