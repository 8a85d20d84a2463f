"""Write weights to a safetensors file in an order that allows memory-mapping, and map them.

Compiled code needs aligned tensors, which the safetensors package does not provide. Here tensors
are ordered so that most start at aligned offsets, and only the others are copied.
"""

from __future__ import annotations

import json
import math
import mmap
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Protocol

import numpy as np

from dcnv3_tvm.digests import digest_of
from dcnv3_tvm.errors import ArtifactError
from dcnv3_tvm.runtime.tensors import ALIGNMENT, aligned_bytes, aligned_copy, view

_DTYPES: Final = {
    "F64": ("float64", 8),
    "F32": ("float32", 4),
    "F16": ("float16", 2),
    "BF16": ("bfloat16", 2),
    "I64": ("int64", 8),
    "I32": ("int32", 4),
    "I16": ("int16", 2),
    "I8": ("int8", 1),
    "U8": ("uint8", 1),
    "BOOL": ("bool", 1),
}
_TAGS: Final = {dtype: tag for tag, (dtype, _) in _DTYPES.items()}
_HEADER_LIMIT: Final = 100_000_000


class Weight(Protocol):
    """A NumPy array, or an object that computes one when it is converted to it."""

    @property
    def shape(self) -> tuple[int, ...]: ...  # noqa: D102 - as in NumPy

    @property
    def dtype(self) -> np.dtype[Any]: ...  # noqa: D102

    @property
    def nbytes(self) -> int: ...  # noqa: D102

    def __array__(self) -> np.ndarray: ...


def write(path: Path, weights: Mapping[str, Weight]) -> None:
    """Write a safetensors file with as many aligned tensors as possible.

    Parameters
    ----------
    path : Path
        The file.
    weights : mapping of str to Weight
        Arrays of any memory layout. One at a time is computed, made contiguous and written.

    Raises
    ------
    ArtifactError
        If the format does not support the dtype of a weight.
    OSError
        If it cannot be written.
    """
    names = _order(weights)
    header: dict[str, Any] = {}
    position = 0
    for name in names:
        array = weights[name]
        tag = _TAGS.get(str(array.dtype))
        if tag is None:
            raise ArtifactError(
                f"the weight {name!r} has a dtype that safetensors does not support",
                got=array.dtype,
                allowed=", ".join(_TAGS),
                hint="Convert it before importing the model.",
            )
        end = position + array.nbytes
        header[name] = {"dtype": tag, "shape": array.shape, "data_offsets": (position, end)}
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    with path.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            # As bytes, because bfloat16 arrays do not export a buffer.
            flat = np.ascontiguousarray(weights[name]).reshape(-1)
            stream.write(flat.view(np.uint8).data)


def _order(weights: Mapping[str, Weight]) -> list[str]:
    """Put multiples of the alignment first, so that all of these and the next one are aligned."""
    sizes = {name: array.nbytes for name, array in weights.items()}
    multiples = [name for name, size in sizes.items() if size % ALIGNMENT == 0]
    others = [name for name, size in sizes.items() if size % ALIGNMENT != 0]
    return multiples + sorted(others, key=sizes.__getitem__, reverse=True)


def read(path: Path, *, digest: bool = True) -> tuple[dict[str, Any], str]:
    """Map the tensors of a safetensors file; copy those that are not aligned.

    Mapped tensors share memory with other processes that map the file, and are read from disk on
    first use.

    Parameters
    ----------
    path : Path
        The file. It may be replaced or removed afterwards, but must not be edited in place.
    digest : bool
        Compute the digest, which reads the whole file.

    Returns
    -------
    tensors : dict of str to tvm_ffi.Tensor
        Each keeps the mapping alive.
    digest : str
        Digest of the whole file as of `digests`; empty if not requested.

    Raises
    ------
    ArtifactError
        If the file is truncated, or not a safetensors file.
    OSError
        If it cannot be read.
    """
    content = _content(path)
    length = int.from_bytes(content[:8].tobytes(), "little")
    if content.size < 8 or length > min(_HEADER_LIMIT, content.size - 8):
        raise _format_error(path, f"a header of {length} bytes in a file of {content.size}")
    header, data = content[8 : 8 + length], content[8 + length :]
    tensors: dict[str, Any] = {}
    position = 0
    for name, start, end, shape, dtype in _entries(header.tobytes(), data.size, path):
        if start != position:
            raise _format_error(path, f"{name!r} starts at byte {start} instead of {position}")
        part = data[start:end]
        if part.ctypes.data % ALIGNMENT:
            part = aligned_copy(part)
        tensors[name] = view(part, shape, dtype)
        position = end
    if position != data.size:
        raise _format_error(path, f"{data.size - position} bytes after the last tensor")
    return tensors, digest_of(content.data) if digest else ""


def _content(path: Path) -> np.ndarray:
    """Return the bytes of a file at an aligned address: mapped, or read if mapping fails."""
    with path.open("rb") as stream:
        try:
            # The mapping keeps the content of a file that is removed or replaced by a rename, which
            # is how artifacts are written. Truncating the file in place would crash this process.
            # The mapping is private, not read-only, because DLPack rejects read-only arrays.
            mapping = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY)
        except (OSError, ValueError):  # The file system cannot map, or the file is empty.
            content = aligned_bytes(os.fstat(stream.fileno()).st_size)
            if stream.readinto(content.data) != content.size:
                raise _format_error(path, "the file ends early") from None
            return content
    return np.frombuffer(mapping, np.uint8)


def _entries(
    header: bytes, available: int, path: Path
) -> list[tuple[str, int, int, list[int], str]]:
    try:
        data = json.loads(header)
        data.pop("__metadata__", None)
        entries = []
        for name, entry in data.items():
            start, end = entry["data_offsets"]
            dtype, size = _DTYPES[entry["dtype"]]
            if not all(_is_count(number) for number in (start, end, *entry["shape"])):
                raise ValueError(f"{name!r} has an invalid shape or invalid offsets")
            if end - start != size * math.prod(entry["shape"]):
                raise ValueError(f"{name!r} has a size that does not match its shape")
            if end > available:
                raise ValueError(f"{name!r} ends at byte {end} of {available}")
            entries.append((name, start, end, entry["shape"], dtype))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _format_error(path, f"{type(error).__name__}: {error}") from error
    return sorted(entries, key=lambda entry: entry[1:3])


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < 1 << 63


def _format_error(path: Path, got: str) -> ArtifactError:
    return ArtifactError(
        f"{path.name} is truncated or not a safetensors file",
        got=got,
        hint="Copy the artifact again, or compile the model again.",
    )
