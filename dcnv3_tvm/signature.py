"""Names, shapes and layouts of what goes into and comes out of a compiled function."""

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
        Sizes; a string names a size that is known only at run time (``"n"``).
    dtype : str
        Element type.
    layout : str
        One letter an axis, for example ``"NCHW"``; empty where nothing is known.
    stride : int or None
        Pixels of the image to one step of a feature map; None for what is no feature map.
    """

    name: str
    shape: tuple[int | str, ...]
    dtype: str
    layout: str = ""
    stride: int | None = None

    def to_json(self) -> dict[str, Any]:
        """Return plain values for ``json.dumps``."""
        return dataclasses.asdict(self) | {"shape": list(self.shape)}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> TensorInfo:
        """Read back what `to_json` gave."""
        return cls(**(data | {"shape": tuple(data["shape"])}))


@dataclasses.dataclass(frozen=True)
class Entry:
    """One callable function of a model: ``main``, or ``features``.

    Parameters
    ----------
    inputs, outputs : tuple of TensorInfo
        In call order.
    weights : tuple of str
        Names of the weights the function takes after its inputs, in call order.
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

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Entry:
        """Read back what `to_json` gave."""
        return cls(
            inputs=tuple(TensorInfo.from_json(tensor) for tensor in data["inputs"]),
            outputs=tuple(TensorInfo.from_json(tensor) for tensor in data["outputs"]),
            weights=tuple(data["weights"]),
        )
