"""The image as a model sees it, for people."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from dcnv3_tvm.preprocessing import check_settings


def photo_of(image: npt.NDArray[Any], preprocessing: Mapping[str, Any]) -> npt.NDArray[np.uint8]:
    """Return the picture that a preprocessed image was made of.

    Parameters
    ----------
    image : numpy.ndarray
        One image as `dcnv3_tvm.runtime.image.preprocess` returns it, (1, 3, H, W) or (1, H, W, 3).
    preprocessing : mapping
        Its settings, such as ``model.metadata.preprocessing``.

    Returns
    -------
    numpy.ndarray
        Shape (H, W, 3), RGB, uint8.

    Raises
    ------
    InvalidArgumentError
        If a setting is missing or invalid.
    """
    settings = check_settings(preprocessing)
    pixels = image[0].transpose(1, 2, 0) if settings["layout"] == "NCHW" else image[0]
    values = 255 * (pixels.astype(np.float64) * settings["std"] + settings["mean"])
    photo: npt.NDArray[np.uint8] = values.round().clip(0, 255).astype(np.uint8)
    return photo
