"""Read the image of a request within limits, and decode it."""

from __future__ import annotations

import asyncio
import dataclasses
import io
from collections.abc import Mapping
from typing import Any, Final

import PIL.Image
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.types import Message, Receive

from dcnv3_tvm import checks
from dcnv3_tvm.errors import DCNv3Error, InvalidArgumentError, first_line

FORMATS: Final = {
    "image/bmp": "BMP",
    "image/gif": "GIF",
    "image/jpeg": "JPEG",
    "image/png": "PNG",
    "image/tiff": "TIFF",
    "image/webp": "WEBP",
}
"""Pillow's decoders by media type. It has others that run programs, such as Ghostscript for EPS."""

MAX_SCANS: Final = 50
"""Of a JPEG file. Progressive files have some ten; each scan takes the time of all pixels."""

_START_OF_SCAN: Final = b"\xff\xda"

FIELD: Final = "image"
"""Name of the form field that holds the file."""


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a request may need.

    Parameters
    ----------
    body_bytes : int
        Size of the body.
    pixels : int
        Width times height of the image. A decoder takes some 12 bytes for each.
    seconds : float
        Time from the end of the headers to the response.
    queue : int
        Images that wait for a decoder or the model, or are being computed. As many bodies may be
        received at the same time.
    """

    body_bytes: int = 10_000_000
    pixels: int = 25_000_000
    seconds: float = 10.0
    queue: int = 64

    def __post_init__(self) -> None:
        for name in ("body_bytes", "pixels", "queue"):
            checks.integer(name, getattr(self, name), low=1)
        if not self.seconds > 0:
            raise InvalidArgumentError("seconds are not above 0", got=self.seconds)


class RejectedError(DCNv3Error):
    """A request is answered with an error.

    Parameters
    ----------
    status : int
        HTTP status.
    problem, got, allowed, hint
        As in `DCNv3Error`.
    headers : mapping, optional
        Of the response.
    """

    def __init__(
        self, status: int, problem: str, *, headers: Mapping[str, str] | None = None, **details: Any
    ) -> None:
        super().__init__(problem, **details)
        self.status = status
        self.headers = dict(headers or {})


async def read_upload(request: Request, limits: Limits) -> bytes:
    """Return the file in the body of a request, which is a form or the file itself.

    Raises
    ------
    RejectedError
        If the media type, the size or the form is wrong, or the body takes too long.
    starlette.requests.ClientDisconnect
        If the client closes the connection.
    """
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    is_form = media_type == "multipart/form-data"
    if not is_form and media_type not in (*FORMATS, "application/octet-stream"):
        raise RejectedError(
            415,
            "the media type is not supported",
            got=media_type or "no Content-Type",
            allowed=", ".join([*FORMATS, "application/octet-stream", "multipart/form-data"]),
            hint="For example: curl -H 'Content-Type: image/jpeg' --data-binary @photo.jpg, or "
            f"curl -F {FIELD}=@photo.jpg",
        )
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length) > limits.body_bytes:
        raise _too_large(f"{length} bytes", limits)
    limited = Request(request.scope, _counted(request.receive, limits))
    read = _read_form(limited) if is_form else limited.body()
    try:
        data = await asyncio.wait_for(read, limits.seconds)
    except asyncio.TimeoutError:
        raise RejectedError(
            408,
            "the body was not received in time",
            allowed=f"{limits.seconds:g} s",
            headers={"Connection": "close"},
        ) from None
    if not data:
        raise RejectedError(400, "the image is empty", got="0 bytes")
    return data


def _counted(receive: Receive, limits: Limits) -> Receive:
    received = 0

    async def receive_within_limit() -> Message:
        nonlocal received
        message = await receive()
        received += len(message.get("body", b""))
        if received > limits.body_bytes:
            raise _too_large(f"at least {received} bytes", limits)
        return message

    return receive_within_limit


def _too_large(got: str, limits: Limits) -> RejectedError:
    return RejectedError(
        413, "the body is too large", got=got, allowed=f"{limits.body_bytes} bytes"
    )


async def _read_form(request: Request) -> bytes:
    try:
        async with request.form(max_files=1, max_fields=16) as form:
            value = form.get(FIELD)
            if isinstance(value, UploadFile):
                return await value.read()
            names = ", ".join(form) or "no fields"
    except HTTPException as error:  # Starlette's for a malformed form.
        raise RejectedError(400, "the form is malformed", hint=f"({error.detail})") from error
    raise RejectedError(
        400, "the form has no file", got=names, allowed=f"a file in the field {FIELD!r}"
    )


def decode(data: bytes, limits: Limits) -> PIL.Image.Image:
    """Open an image, whose pixels are not decoded yet.

    Raises
    ------
    RejectedError
        If it is none of `FORMATS`, is damaged, or would take too much memory or time.
    """
    try:
        picture = PIL.Image.open(io.BytesIO(data), formats=list(FORMATS.values()))
    except PIL.UnidentifiedImageError:
        raise RejectedError(
            415,
            "the content is not an image",
            got=f"{len(data)} bytes that start with {data[:8]!r}",
            allowed=", ".join(FORMATS.values()),
        ) from None
    except PIL.Image.DecompressionBombError as error:
        raise RejectedError(
            413, "the image has too many pixels", allowed=limits.pixels, hint=f"({error})"
        ) from None
    except Exception as error:  # pillow raises about a dozen types for damaged files.
        raise RejectedError(
            422, "the image cannot be read", hint=f"({first_line(error)})"
        ) from error
    if picture.width * picture.height > limits.pixels:
        raise RejectedError(
            413,
            "the image has too many pixels",
            got=f"{picture.width} x {picture.height}",
            allowed=limits.pixels,
        )
    scans = data.count(_START_OF_SCAN) if picture.format in ("JPEG", "MPO") else 1
    if scans > MAX_SCANS:
        raise RejectedError(413, "the JPEG file has too many scans", got=scans, allowed=MAX_SCANS)
    return picture
