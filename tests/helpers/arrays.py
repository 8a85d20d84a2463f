"""Random arrays."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt


def random_array(
    rng: np.random.Generator, *shape: int, dtype: npt.DTypeLike = "float32", scale: float = 1.0
) -> npt.NDArray[Any]:
    """Draw an array of normal numbers with the standard deviation `scale`."""
    return (scale * rng.standard_normal(shape)).astype(dtype)
