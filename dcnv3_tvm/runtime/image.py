"""Preprocess images for a model, and convert logits to classes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from dcnv3_tvm import checks
from dcnv3_tvm.dtypes import numpy_dtype
from dcnv3_tvm.errors import ImageError, InvalidArgumentError
from dcnv3_tvm.preprocessing import check_settings
from dcnv3_tvm.runtime import tensors
from dcnv3_tvm.runtime.open_image import Source, open_image, pillow

if TYPE_CHECKING:
    import PIL.Image

_MAX_ASPECT_RATIO: Final = 8
"""Images with a larger aspect ratio are cropped before resizing, which bounds the memory."""


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
    settings = check_settings(settings)
    element = numpy_dtype(dtype)
    height, width = settings["crop"]
    images = (_opened(index, sources, value_range) for index in range(len(sources)))
    pixels = np.empty((len(sources), height, width, 3), np.uint8)
    for index, picture in enumerate(images):
        pixels[index] = _resize_and_crop(picture, settings)
    mean = np.asarray(settings["mean"], np.float32) * 255
    std = np.asarray(settings["std"], np.float32) * 255
    batch = (pixels.astype(np.float32) - mean) / std
    shape: tuple[int, ...] = (len(sources), height, width, 3)
    if settings["layout"] == "NCHW":
        batch = batch.transpose(0, 3, 1, 2)
        shape = (len(sources), 3, height, width)
    result = tensors.aligned_bytes(batch.size * element.itemsize).view(element).reshape(shape)
    result[...] = batch
    return result


def top_k(logits: Any, k: int = 5, *, labels: Sequence[str] = ()) -> tuple[np.ndarray, np.ndarray]:
    """Return the most probable classes and their probabilities.

    Parameters
    ----------
    logits : array of shape (N, classes)
        A NumPy, PyTorch or TVM array of real numbers. The batch may be empty.
    k : int
        Number of classes to return.
    labels : sequence of str, optional
        Names of the classes, for example ``model.metadata.labels``; by default their numbers.

    Returns
    -------
    classes : numpy.ndarray of int64, or of str with `labels`; shape (N, k)
    probabilities : numpy.ndarray of float64, shape (N, k)
        In descending order.

    Raises
    ------
    InvalidArgumentError
        If `logits` is not a matrix of real numbers, has NaN or positive infinity, or `k` or the
        number of labels is out of range.

    Examples
    --------
    >>> classes, probabilities = top_k(np.array([[0.0, 2.0, 1.0]]), k=2)
    >>> classes.tolist(), probabilities.round(3).tolist()
    ([[1, 2]], [[0.665, 0.245]])
    """
    tensors.kind_of("logits", logits, hint="Of several outputs, pass one: outputs['logits'].")
    if str(logits.dtype) == "torch.bfloat16":
        logits = logits.detach().float()  # Without a loaded model, only PyTorch can convert it.
    if tensors.device_of(logits) != tensors.CPU:
        raise InvalidArgumentError(
            "logits are on a GPU", got=tensors.device_of(logits), hint="Use logits.cpu()."
        )
    is_array = isinstance(logits, np.ndarray)
    values = logits if is_array else tensors.to_numpy(tensors.to_kernel(logits))
    is_real = values.dtype.kind in "fiu" or values.dtype.name == "bfloat16"
    if values.ndim != 2 or not is_real:
        raise InvalidArgumentError(
            "logits are not a matrix of real numbers",
            got=f"{values.dtype} of shape {values.shape}",
            allowed="(N, classes)",
        )
    k = checks.integer("k", k, low=1, high=values.shape[1])
    if labels and len(labels) != values.shape[1]:
        raise InvalidArgumentError(
            "the number of labels is not that of the classes",
            got=f"{len(labels)} labels",
            allowed=values.shape[1],
        )
    values = values.astype(np.float64)
    highest = values.max(axis=1, keepdims=True)
    if not np.isfinite(highest).all():
        raise InvalidArgumentError(
            "logits have NaN, or infinities that leave no probabilities",
            got=f"a maximum of {highest[~np.isfinite(highest)][0]}",
        )
    exponentials = np.exp(values - highest)
    probabilities = exponentials / exponentials.sum(axis=1, keepdims=True)
    classes = np.argsort(-values, axis=1, kind="stable")[:, :k].astype(np.int64)
    chosen = np.take_along_axis(probabilities, classes, axis=1)
    return np.array(labels)[classes] if labels else classes, chosen


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
