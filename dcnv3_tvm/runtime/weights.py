"""Weights in a safetensors file: written so that they can be mapped, and mapped instead of copied.

The format is written and read here, not by its package, because compiled code takes aligned
addresses alone: of a file that starts as many tensors as possible at such, few have to be copied.
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np

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


def write(path: Path, weights: Mapping[str, np.ndarray]) -> None:
    """Write a safetensors file whose tensors can be used where they lie, as far as possible.

    Parameters
    ----------
    path : Path
        The file.
    weights : mapping of str to numpy.ndarray
        Any layout in memory; one at a time is copied.

    Raises
    ------
    ArtifactError
        If a weight has a type that has no place in the file.
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
                f"the weight {name!r} has a type that cannot be written",
                got=array.dtype,
                allowed=", ".join(_TAGS),
                hint="Convert it to one of these before the model is imported.",
            )
        end = position + array.nbytes
        header[name] = {"dtype": tag, "shape": array.shape, "data_offsets": (position, end)}
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    with path.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            # As bytes, because not every type has a buffer that files take.
            flat = np.ascontiguousarray(weights[name]).reshape(-1)
            stream.write(flat.view(np.uint8).data)


def _order(weights: Mapping[str, np.ndarray]) -> list[str]:
    """Put in front what leaves the next one aligned; the largest of the rest is aligned too."""
    sizes = {name: array.nbytes for name, array in weights.items()}
    even = [name for name, size in sizes.items() if size % ALIGNMENT == 0]
    odd = [name for name, size in sizes.items() if size % ALIGNMENT != 0]
    return even + sorted(odd, key=sizes.__getitem__, reverse=True)


def read(path: Path, *, digest: bool = True) -> tuple[dict[str, Any], str]:
    """Give the tensors of a safetensors file, without a copy where they are aligned in it.

    Those share the file's pages with every other process that has it mapped, and are read from the
    disk when they are first needed.

    Parameters
    ----------
    path : Path
        The file. It may be replaced or removed afterwards, and must not be edited in place.
    digest : bool
        Go through the whole file once for its digest.

    Returns
    -------
    tensors : dict of str to tvm_ffi.Tensor
        Each keeps what it needs of the file.
    digest : str
        SHA-256 of the whole file; empty where not asked for.

    Raises
    ------
    ArtifactError
        If the file is truncated, or no safetensors file.
    OSError
        If it cannot be read.
    """
    content = _content(path)
    length = int.from_bytes(content[:8].tobytes(), "little")
    if content.size < 8 or length > min(_HEADER_LIMIT, content.size - 8):
        raise _broken(path, f"a header of {length} bytes in a file of {content.size}")
    header, data = content[8 : 8 + length], content[8 + length :]
    tensors: dict[str, Any] = {}
    position = 0
    for name, start, end, shape, dtype in _entries(header.tobytes(), data.size, path):
        if start != position:
            raise _broken(path, f"{name!r} starts at {start}, not at {position}")
        part = data[start:end]
        if part.ctypes.data % ALIGNMENT:
            part = aligned_copy(part)
        tensors[name] = view(part, shape, dtype)
        position = end
    if position != data.size:
        raise _broken(path, f"{data.size - position} bytes more than its tensors have")
    return tensors, hashlib.sha256(content.data).hexdigest() if digest else ""


def _content(path: Path) -> np.ndarray:
    """Return the bytes of a file from an aligned address on: mapped, or read where that fails."""
    with path.open("rb") as stream:
        try:
            # A mapping holds the file, not its name: one that is removed, or replaced by a rename
            # as by all that write artifacts, stays as it was until the last array over it is gone.
            # One that is cut short in place takes its pages away, and touching them kills the
            # process: nothing but a copy could prevent that, and it is what is saved here.
            # Private instead of read-only, because DLPack refuses read-only arrays; nobody writes,
            # and what somebody wrote would stay in this process.
            mapping = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY)
        except (OSError, ValueError):  # not every file system can; an empty file cannot be
            content = aligned_bytes(os.fstat(stream.fileno()).st_size)
            if stream.readinto(content.data) != content.size:
                raise _broken(path, "it is cut short") from None
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
                raise ValueError(f"{name!r} has a shape or offsets that cannot be")
            if end - start != size * math.prod(entry["shape"]):
                raise ValueError(f"{name!r} has a size that is not its shape's")
            if end > available:
                raise ValueError(f"{name!r} ends at byte {end} of {available}")
            entries.append((name, start, end, entry["shape"], dtype))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _broken(path, f"{type(error).__name__}: {error}") from error
    return sorted(entries, key=lambda entry: entry[1:3])


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < 1 << 63


def _broken(path: Path, what: str) -> ArtifactError:
    return ArtifactError(
        f"{path.name} is truncated or no safetensors file",
        got=what,
        hint="Copy the artifact again, or compile the model again.",
    )
