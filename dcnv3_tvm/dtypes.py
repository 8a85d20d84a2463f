"""Supported element types."""

from __future__ import annotations

from typing import Any, Final

import numpy as np

DTYPE_BYTES: Final = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}
"""Element types of the operator and their sizes in bytes."""


def numpy_dtype(name: str) -> np.dtype[Any]:
    """Return the NumPy dtype of a name; bfloat16 is provided by ml_dtypes."""
    if name == "bfloat16":
        import ml_dtypes

        bfloat16: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16)
        return bfloat16
    return np.dtype(name)
