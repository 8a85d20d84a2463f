"""Open an image of any kind as an 8-bit RGB image."""

from __future__ import annotations

import io
import os
import stat
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Final, TypeAlias

import numpy as np

from dcnv3_tvm.errors import ImageError, InvalidArgumentError, MissingDependencyError, first_line

if TYPE_CHECKING:
    import PIL.Image

Source: TypeAlias = "str | os.PathLike[str] | bytes | IO[bytes] | PIL.Image.Image | np.ndarray"
"""One image: a file, its content, an open binary file, a PIL image or an array."""

_WIDE_MODES: Final = {"I": "32-bit integers", "F": "floats"}
"""PIL's modes whose range the file does not tell."""

_TIFF_BITS_PER_SAMPLE: Final = 258
_TIFF_PHOTOMETRIC: Final = 262
_TIFF_WHITE_IS_ZERO: Final = 0


def open_image(source: Any, value_range: tuple[float, float] | None = None) -> PIL.Image.Image:
    """Open an image as 8-bit RGB, with its EXIF orientation applied.

    Parameters
    ----------
    source : Source
        An array is of shape (H, W, 3), RGB, or (H, W), of uint8 or uint16, or with `value_range` of
        any real type. Of an animation, the first frame is taken.
    value_range : (float, float), optional
        Values of black and of white in images of more than 8 bits.

    Raises
    ------
    ImageError
        If it is not an image, is damaged, or its range is unknown.
    InvalidArgumentError
        If `value_range` is invalid.
    MissingDependencyError
        If pillow is not installed.
    """
    pil, ops = pillow()
    if value_range is not None:
        value_range = _checked_range(value_range)
    if isinstance(source, np.ndarray):
        opened: PIL.Image.Image = pil.fromarray(_from_array(source, value_range))
        return opened.convert("RGB")
    try:
        opened = source if isinstance(source, pil.Image) else pil.open(_readable(source))
        known_range = _known_range(opened)
        opened = ops.exif_transpose(opened)
        if opened.mode.startswith("I;16") or opened.mode in _WIDE_MODES:
            kind = _WIDE_MODES.get(opened.mode, "16 bits")
            opened = pil.fromarray(_to_bytes(np.asarray(opened), value_range or known_range, kind))
        if opened.mode == "La":
            opened = opened.convert("LA")  # PIL converts it to nothing else.
        return opened.convert("RGB")
    except (ImageError, MemoryError):
        raise
    except FileNotFoundError as error:
        raise ImageError("the image file does not exist", got=source) from error
    except Exception as error:  # pillow raises about a dozen types for damaged files.
        got = source if isinstance(source, str | os.PathLike) else type(source).__name__
        unknown = isinstance(error, pil.UnidentifiedImageError)
        reason = "pillow knows no such format" if unknown else first_line(error)
        raise ImageError("the image cannot be read", got=got, hint=f"({reason})") from error


def pillow() -> tuple[Any, Any]:
    """Return PIL's modules Image and ImageOps."""
    try:
        import PIL.Image
        import PIL.ImageOps
    except ImportError as error:
        raise MissingDependencyError(
            "pillow, which reads images, is not installed", hint="Run: pip install pillow"
        ) from error
    return PIL.Image, PIL.ImageOps


def _readable(source: Any) -> Any:
    """Return what PIL reads: a binary file, or the path of a regular file."""
    if isinstance(source, bytes | bytearray | memoryview):
        return io.BytesIO(source)
    if isinstance(source, io.TextIOBase):
        raise ImageError(
            "the file is open in text mode", got=source, hint='Open it with open(path, "rb").'
        )
    if hasattr(source, "read"):
        return source
    path = Path(source)
    # Opening a named pipe waits for a writer, possibly for ever.
    if not stat.S_ISREG(path.stat().st_mode):
        raise ImageError(
            "the image is not a regular file",
            got=source,
            hint="Read a folder's files one by one, and a pipe or device yourself: its bytes are "
            "accepted.",
        )
    return path


def _known_range(opened: PIL.Image.Image) -> tuple[float, float] | None:
    """Return the values of black and white that the mode or the file format defines."""
    if opened.mode.startswith("I;16"):
        # Of a TIFF, PIL leaves 12 bits and inverted values as they are; other formats it converts.
        tags = getattr(opened, "tag_v2", {})
        high = 2 ** tags.get(_TIFF_BITS_PER_SAMPLE, (16,))[0] - 1
        inverted = tags.get(_TIFF_PHOTOMETRIC) == _TIFF_WHITE_IS_ZERO
        return (high, 0) if inverted else (0, high)
    if opened.mode == "I" and opened.format == "PPM":
        return 0, 65535  # PIL scales to this range.
    return None


def _checked_range(value_range: Any) -> tuple[float, float]:
    try:
        low, high = (float(value) for value in value_range)
    except (TypeError, ValueError) as error:
        raise _bad_range(value_range) from error
    if not (np.isfinite([low, high]).all() and low != high):
        raise _bad_range(value_range)
    return low, high


def _bad_range(value_range: object) -> InvalidArgumentError:
    return InvalidArgumentError(
        "value_range is invalid",
        got=repr(value_range),
        allowed="two different finite numbers, the values of black and white, such as (0, 1)",
    )


def _from_array(values: np.ndarray, value_range: tuple[float, float] | None) -> np.ndarray:
    if not (values.size and (values.ndim == 2 or (values.ndim == 3 and values.shape[2] == 3))):
        raise ImageError(
            "the array is not an image",
            got=f"{values.dtype} of shape {values.shape}",
            allowed="shape (height, width, 3), RGB, or (height, width)",
        )
    if values.dtype == np.uint8:
        return np.ascontiguousarray(values)
    if values.dtype.kind not in "iuf":
        raise ImageError(
            "the array is not an image", got=values.dtype, allowed="integers or floats"
        )
    is_uint16 = values.dtype.kind == "u" and values.dtype.itemsize == 2  # Of any byte order.
    known_range = (0.0, 65535.0) if is_uint16 else None
    return _to_bytes(values, value_range or known_range, str(values.dtype))


def _to_bytes(values: np.ndarray, value_range: tuple[float, float] | None, kind: str) -> np.ndarray:
    if value_range is None:
        low, high = values.min(), values.max()
        raise ImageError(
            "the values of black and white are unknown for this kind of image",
            got=f"{kind}, from {low:g} to {high:g}",
            hint="Pass value_range=(0, 1), or what black and white are.",
        )
    low, high = value_range
    scaled = (values.astype(np.float64) - low) * (255 / (high - low))
    if np.isnan(scaled).any():
        raise ImageError("the image contains NaN")
    pixels: np.ndarray = np.rint(np.clip(scaled, 0, 255)).astype(np.uint8)
    return pixels
