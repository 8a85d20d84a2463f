"""Random arrays."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt


def random_array(
    rng: np.random.Generator, *shape: int, dtype: npt.DTypeLike = "float32"
) -> npt.NDArray[Any]:
    """Draw an array of standard normal numbers."""
    return rng.standard_normal(shape).astype(dtype)
