"""Read a safetensors file into TVM tensors.

The format is read here, not by its package, because every tensor has to start at an address that
compiled code can take, and because one pass then gives tensors and digest.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from pathlib import Path
from typing import Any, BinaryIO, Final

from dcnv3_tvm.errors import ArtifactError
from dcnv3_tvm.runtime.tensors import aligned_bytes, view

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
_HEADER_LIMIT: Final = 100_000_000


def read(path: Path) -> tuple[dict[str, Any], str]:
    """Read all tensors of a safetensors file.

    Returns
    -------
    tensors : dict of str to tvm_ffi.Tensor
    digest : str
        SHA-256 of the whole file.

    Raises
    ------
    ArtifactError
        If the file is truncated, or no safetensors file.
    OSError
        If it cannot be read.
    """
    digest = hashlib.sha256()
    tensors: dict[str, Any] = {}
    with path.open("rb") as stream:
        total = os.fstat(stream.fileno()).st_size
        length = int.from_bytes(_take(stream, digest, 8, path), "little")
        if length > min(_HEADER_LIMIT, total):
            raise _broken(path, f"a header of {length} bytes in a file of {total}")
        entries = _entries(_take(stream, digest, length, path), total - 8 - length, path)
        position = 0
        for name, start, end, shape, dtype in entries:
            if start != position:
                raise _broken(path, f"{name!r} starts at {start}, not at {position}")
            buffer = aligned_bytes(end - start)
            if stream.readinto(buffer.data) != end - start:
                raise _broken(path, f"{name!r} is cut short")
            digest.update(buffer.data)
            tensors[name] = view(buffer, shape, dtype)
            position = end
        if stream.read(1):
            raise _broken(path, "more bytes than its tensors have")
    return tensors, digest.hexdigest()


def _take(stream: BinaryIO, digest: Any, count: int, path: Path) -> bytes:
    data = stream.read(count)
    if len(data) != count:
        raise _broken(path, "it is cut short")
    digest.update(data)
    return data


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
            if end - start != size * math.prod(entry["shape"]) or end < start:
                raise ValueError(f"{name!r} has a size that is not its shape's")
            if end > available:
                raise ValueError(f"{name!r} ends at byte {end} of {available}")
            entries.append((name, start, end, entry["shape"], dtype))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _broken(path, f"{type(error).__name__}: {error}") from error
    return sorted(entries, key=lambda entry: entry[1:3])


def _broken(path: Path, what: str) -> ArtifactError:
    return ArtifactError(
        f"{path.name} is truncated or no safetensors file",
        got=what,
        hint="Copy the artifact again, or compile the model again.",
    )
