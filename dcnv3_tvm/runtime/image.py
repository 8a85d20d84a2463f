"""Preprocess images for a model, and convert logits to classes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from dcnv3_tvm import checks
from dcnv3_tvm.dtypes import numpy_dtype
from dcnv3_tvm.errors import ImageError, InvalidArgumentError
from dcnv3_tvm.runtime.open_image import Source, open_image, pillow
from dcnv3_tvm.runtime.tensors import aligned_bytes

if TYPE_CHECKING:
    import PIL.Image

_MAX_ASPECT_RATIO: Final = 8
"""Images with a larger aspect ratio are cropped before resizing, which bounds the memory."""

_MAX_SIZE: Final = 1 << 14
"""Pixels of the shorter side, and of the crop: bounds the memory too."""


def preprocess(
    source: Source | Sequence[Source],
    settings: Mapping[str, Any],
    *,
    dtype: str = "float32",
    value_range: tuple[float, float] | None = None,
) -> np.ndarray:
    """Resize the shorter side, crop the center, normalize.

    Parameters
    ----------
    source : path, bytes, open binary file, PIL image, array, or a list of these
        Any size. Grayscale and transparent images are converted to RGB, 16-bit ones are scaled, and
        the EXIF orientation is applied. Of an animation, the first frame is taken. An array has the
        shape (H, W, 3), RGB, or (H, W), and is uint8 or uint16, or with `value_range` of any real
        type.
    settings : mapping
        ``resize`` (shorter side in pixels), ``crop`` (height, width), ``mean`` and ``std`` (RGB,
        for values between 0 and 1), ``interpolation``, ``layout``.
    dtype : str
        Element type of the result.
    value_range : (float, float), optional
        Values of black and of white in images of more than 8 bits. Needed for 32-bit integers and
        floats, where it is unknown; 16-bit images have the range 0 to 65535 by default.

    Returns
    -------
    numpy.ndarray
        Shape (N, 3, crop height, crop width), or (N, height, width, 3) for ``layout="NHWC"``.

    Raises
    ------
    ImageError
        If an item is not an image; it is named by its index.
    InvalidArgumentError
        If `settings` are empty or invalid, or `value_range` is.
    """
    if not settings:
        raise InvalidArgumentError(
            "this artifact has no preprocessing settings",
            hint="Prepare the input array yourself and call the model with it.",
        )
    sources = list(source) if isinstance(source, list | tuple) else [source]
    if not sources:
        raise ImageError("the sequence of images is empty")
    settings = _checked(settings)
    element = numpy_dtype(dtype)
    height, width = settings["crop"]
    images = (_opened(index, sources, value_range) for index in range(len(sources)))
    pixels = np.stack([_resize_and_crop(picture, settings) for picture in images])
    mean = np.asarray(settings["mean"], np.float32) * 255
    std = np.asarray(settings["std"], np.float32) * 255
    batch = (pixels.astype(np.float32) - mean) / std
    shape: tuple[int, ...] = (len(sources), height, width, 3)
    if settings["layout"] == "NCHW":
        batch = batch.transpose(0, 3, 1, 2)
        shape = (len(sources), 3, height, width)
    result = aligned_bytes(batch.size * element.itemsize).view(element).reshape(shape)
    result[...] = batch
    return result


def top_k(logits: Any, k: int = 5) -> tuple[np.ndarray, np.ndarray]:
    """Return the most probable classes and their probabilities.

    Parameters
    ----------
    logits : array of shape (N, classes)
        A NumPy, PyTorch or TVM array.
    k : int
        Number of classes to return.

    Returns
    -------
    classes : numpy.ndarray of int64, shape (N, k)
    probabilities : numpy.ndarray of float64, shape (N, k)
        In descending order.

    Raises
    ------
    InvalidArgumentError
        If `logits` is not two-dimensional, or `k` is out of range.

    Examples
    --------
    >>> classes, probabilities = top_k(np.array([[0.0, 2.0, 1.0]]), k=2)
    >>> classes.tolist(), probabilities.round(3).tolist()
    ([[1, 2]], [[0.665, 0.245]])
    """
    values = np.asarray(logits if isinstance(logits, np.ndarray) else np.from_dlpack(logits))
    if values.ndim != 2:
        raise InvalidArgumentError(
            "logits have the wrong shape", got=f"shape {values.shape}", allowed="(N, classes)"
        )
    if not 1 <= k <= values.shape[1]:
        raise InvalidArgumentError("k is out of range", got=k, allowed=f"1 to {values.shape[1]}")
    values = values.astype(np.float64)
    exponentials = np.exp(values - values.max(axis=1, keepdims=True))
    probabilities = exponentials / exponentials.sum(axis=1, keepdims=True)
    classes = np.argsort(-values, axis=1, kind="stable")[:, :k].astype(np.int64)
    return classes, np.take_along_axis(probabilities, classes, axis=1)


def _checked(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return valid settings, complete with defaults."""
    missing = sorted({"resize", "crop", "mean", "std"} - settings.keys())
    if missing:
        raise InvalidArgumentError(
            "the preprocessing settings are incomplete", got=f"no {', '.join(missing)}"
        )
    valid = {"interpolation": "bicubic", "layout": "NCHW"} | dict(settings)
    valid["resize"] = checks.integer("resize", valid["resize"], low=1, high=_MAX_SIZE)
    valid["crop"] = checks.pair("crop", valid["crop"], low=1, high=_MAX_SIZE)
    for name in ("mean", "std"):
        numbers = valid[name] if isinstance(valid[name], list | tuple) else ()
        if len(numbers) != 3 or (0 in [checks.finite(name, n) for n in numbers] and name == "std"):
            raise InvalidArgumentError(
                f"{name} is invalid",
                got=repr(valid[name]),
                allowed="a number for each of R, G and B, not zero for std",
            )
    methods = sorted(method.name.lower() for method in pillow()[0].Resampling)
    for name, allowed in (("interpolation", methods), ("layout", ["NCHW", "NHWC"])):
        if valid[name] not in allowed:
            raise InvalidArgumentError(
                f"{name} is unknown", got=repr(valid[name]), allowed=", ".join(allowed)
            )
    return valid


def _opened(
    index: int, sources: Sequence[Source], value_range: tuple[float, float] | None
) -> PIL.Image.Image:
    try:
        return open_image(sources[index], value_range)
    except ImageError as error:
        if len(sources) == 1:
            raise
        raise ImageError(
            f"item {index} of the {len(sources)} images: {error.problem}",
            got=error.got,
            allowed=error.allowed,
            hint=error.hint,
        ) from error


def _resize_and_crop(picture: PIL.Image.Image, settings: Mapping[str, Any]) -> np.ndarray:
    pil, _ = pillow()
    picture = _limit_aspect_ratio(picture)
    crop_height, crop_width = settings["crop"]
    scale = settings["resize"] / min(picture.size)
    # Rounded as in the published preprocessing, for the same pixels.
    width, height = (
        settings["resize"] if size == min(picture.size) else int(scale * size)
        for size in picture.size
    )
    method = pil.Resampling[settings["interpolation"].upper()]
    resized = picture.resize((max(width, crop_width), max(height, crop_height)), method)
    left = round((resized.width - crop_width) / 2)
    top = round((resized.height - crop_height) / 2)
    cropped = resized.crop((left, top, left + crop_width, top + crop_height))
    return np.asarray(cropped, np.uint8)


def _limit_aspect_ratio(picture: PIL.Image.Image) -> PIL.Image.Image:
    width, height = picture.size
    limit = _MAX_ASPECT_RATIO * min(width, height)
    if max(width, height) <= limit:
        return picture
    new_width, new_height = min(width, limit), min(height, limit)
    left, top = (width - new_width) // 2, (height - new_height) // 2
    return picture.crop((left, top, left + new_width, top + new_height))
