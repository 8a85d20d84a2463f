"""One self-contained HTML page on which the sampling points follow the pointer."""

from __future__ import annotations

import base64
import html
import importlib.resources
import io
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from dcnv3_tvm.errors import InvalidArgumentError
from dcnv3_tvm.op.reference import first_position
from dcnv3_tvm.runtime.open_image import pillow
from dcnv3_tvm.visualize.block_sampling import BlockSampling, typical_block

MAX_BYTES: Final = 8_000_000
"""Bytes of points and weights in a page; base64 makes a third more of them."""

_NOT_A_NUMBER: Final = -32768
_LARGEST: Final = 32767
_BYTES_OF_POINT: Final = 6
_LOSSLESS_PIXELS: Final = 128 * 128
_LONGEST: Final = 8
"""Longest offset in a page, in sizes of the map: one that is far off leaves others their digits."""


def render_page(
    blocks: Sequence[BlockSampling],
    photo: npt.NDArray[np.uint8],
    *,
    title: str,
    max_bytes: int = MAX_BYTES,
) -> str:
    """Return the page: HTML with the image, the points and all code inside; it loads nothing.

    Offsets and weights are stored as 16-bit integers, to 1/32767 of the largest of a block; longer
    offsets than eight times the map are shortened to that. Where all blocks take more than
    `max_bytes`, the last block of each stage comes first, the deepest stage before the others; the
    page says which blocks are left out, and takes them for identities in receptive fields.

    Parameters
    ----------
    blocks : sequence of BlockSampling
        From `capture_sampling`.
    photo : numpy.ndarray
        The image that the model saw, (H, W, 3), uint8.
    title : str
        Title of the page.
    max_bytes : int
        Bound of the points and weights of all blocks.

    Raises
    ------
    InvalidArgumentError
        If not even one block fits.
    """
    return fill_page(page_data(blocks, photo, max_bytes=max_bytes), title=title)


def page_data(
    blocks: Sequence[BlockSampling], photo: npt.NDArray[np.uint8], *, max_bytes: int = MAX_BYTES
) -> dict[str, Any]:
    """Return what a page shows, as JSON values for `fill_page`.

    Parameters
    ----------
    blocks, photo, max_bytes
        As for `render_page`.
    """
    kept = _blocks_that_fit(blocks, max_bytes)
    height, width, _ = photo.shape
    return {
        "photo": _data_uri(photo),
        "width": width,
        "height": height,
        "start": typical_block(kept),
        "about": _about(blocks, kept),
        "blocks": [_encoded(block) for block in kept],
    }


def fill_page(data: Mapping[str, Any], *, title: str) -> str:
    """Return the page for the result of `page_data`, which may have been kept in a file."""
    parts = {
        # File names may hold bytes that are no text.
        "title": html.escape(title.encode("utf-8", "backslashreplace").decode("utf-8")),
        "style": _text("page.css"),
        "script": _text("page.js"),
        # Nothing in it may end the script element.
        "data": json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c"),
    }
    # In one pass: a title may hold {{data}}.
    return re.sub(r"{{(\w+)}}", lambda found: parts[found[1]], _text("page.html"))


def _text(name: str) -> str:
    return importlib.resources.files("dcnv3_tvm.visualize").joinpath(name).read_text("utf-8")


def _blocks_that_fit(blocks: Sequence[BlockSampling], max_bytes: int) -> list[BlockSampling]:
    """Return as many blocks as fit, in their order."""
    last = {block.stage: index for index, block in enumerate(blocks)}
    order = sorted(range(len(blocks)), key=lambda i: (i not in last.values(), -i))
    kept, left = [], max_bytes
    for index in order:
        size = _BYTES_OF_POINT * blocks[index].weights.size
        if size <= left:
            kept.append(index)
            left -= size
    if not kept:
        raise InvalidArgumentError(
            "no block fits into the page",
            got=f"{_BYTES_OF_POINT * blocks[-1].weights.size} bytes for the last block",
            allowed=f"{max_bytes} bytes",
            hint="Use a smaller image.",
        )
    return [blocks[index] for index in sorted(kept)]


def _about(blocks: Sequence[BlockSampling], kept: Sequence[BlockSampling]) -> str:
    text = "Offsets and weights are rounded to 1/32767 of the largest of a block."
    missing = [block for block in blocks if not any(block is each for each in kept)]
    if missing:
        names = ", ".join(f"{block.stage}.{block.block}" for block in missing)
        text += (
            f" Left out to bound the size of the page, as stage.block: {names}. Receptive fields "
            "pass them unchanged."
        )
    return text


def _encoded(block: BlockSampling) -> dict[str, Any]:
    displacement = block.displacement
    longest = _LONGEST * max(block.size)
    shifts, scale = _rounded(displacement.clip(-longest, longest))
    weights, weight_scale = _rounded(block.weights)
    # As the operator does, the page ignores points that are nowhere.
    shifts[~np.isfinite(displacement).all(axis=-1)] = _NOT_A_NUMBER
    return {
        "stage": block.stage,
        "block": block.block,
        "groups": block.params.group,
        "size": block.size,
        "output": block.output_size,
        "stride": block.stride,
        "origin": block.origin,
        "step": block.params.stride,
        "first": [first_position(block.params, axis) for axis in (0, 1)],
        "grid": [
            [round(float(value), 4) for value in point] for point in block.regular_points[0, 0, 0]
        ],
        "scale": scale,
        "displacement": _base64(shifts.tobytes()),
        "weight_scale": weight_scale,
        "weights": _base64(weights.tobytes()),
    }


def _rounded(values: npt.NDArray[np.float32]) -> tuple[npt.NDArray[np.int16], float]:
    """Return little-endian integers, and the number that they are to be multiplied by."""
    finite = np.where(np.isfinite(values), values, 0)
    scale = float(np.abs(finite).max()) / _LARGEST or 1.0
    return np.rint(finite / scale).astype("<i2"), scale


def _base64(content: bytes) -> str:
    return base64.b64encode(content).decode("ascii")


def _data_uri(photo: npt.NDArray[np.uint8]) -> str:
    pil, _ = pillow()
    lossless = photo.shape[0] * photo.shape[1] <= _LOSSLESS_PIXELS
    buffer = io.BytesIO()
    picture = pil.fromarray(photo)
    if lossless:
        picture.save(buffer, "PNG", optimize=True)
    else:
        picture.save(buffer, "JPEG", quality=88)
    return f"data:image/{'png' if lossless else 'jpeg'};base64,{_base64(buffer.getvalue())}"
