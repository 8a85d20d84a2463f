"""Read the tensors of a checkpoint file or folder without running code from it.

The format is detected from the first bytes, not from the file name. safetensors files contain only
tensors. PyTorch files are pickles and are read with ``weights_only=True``, which builds tensors and
plain values and rejects everything else.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dcnv3_tvm.errors import CheckpointError
from dcnv3_tvm.frontend.checkpoints.containers import CheckpointTensors, select_container
from dcnv3_tvm.frontend.checkpoints.restricted_pickle import is_malicious, make_pickle_module

FOLDER_FILES: Final = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
"""Files looked for in a folder, in this order."""

_INDEX: Final = ".index.json"

_OTHER_FORMATS: Final = (
    (b"\x89PNG", "a PNG image"),
    (b"\xff\xd8\xff", "a JPEG image"),
    (b"version https://git-lfs", "a Git LFS pointer, not the file itself"),
    (b"<", "a web page or XML"),
    (b"\x1f\x8b", "a gzip archive"),
    (b"\x7fELF", "a program or library"),
    (b"\x89HDF", "an HDF5 file"),
    (b"\x80", "a plain Python pickle"),
)

_LEGACY_TORCH_MAGIC: Final = b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19"
"""The pickled magic number at the start of files from before PyTorch 1.6."""


def read_tensors(
    path: str | Path,
    *,
    use_ema: bool = False,
    ignore_objects: bool = False,
    allow_pickle: bool = False,
) -> CheckpointTensors:
    """Read a checkpoint.

    Parameters
    ----------
    path : str or Path
        A safetensors file, a PyTorch file (``.pth``, ``.pt``, ``.bin``), the index of a sharded
        checkpoint, or a folder with one of them under its Hugging Face name.
    use_ema : bool
        Read the averaged weights (EMA) of a training checkpoint.
    ignore_objects : bool
        Replace objects that are neither tensors nor plain values (a trainer's configuration) by
        empty placeholders. Runs no code from the file.
    allow_pickle : bool
        Unpickle the file without restrictions, **which runs any code it contains**.

    Raises
    ------
    CheckpointError
        If the file cannot be read, is not a checkpoint, or contains no named tensors.
    """
    file = _find_file(Path(path))
    start = _first_bytes(file)
    ignored: list[str] = []
    if file.name.endswith(_INDEX):
        data: Any = _read_shards(file, ignore_objects, allow_pickle)
    elif _is_safetensors(start):
        data = _read_safetensors(file)
    elif start[:2] == b"PK" or _LEGACY_TORCH_MAGIC in start:
        data, ignored = _read_pytorch(file, start, ignore_objects, allow_pickle)
    else:
        found = next((name for magic, name in _OTHER_FORMATS if start.startswith(magic)), None)
        raise CheckpointError(
            f"{file} is not a checkpoint",
            got=found or f"a file that begins with {start[:8]!r}",
            allowed="safetensors, or a file written by torch.save",
        )
    return select_container(file, data, use_ema=use_ema, ignored=tuple(ignored))


def _find_file(path: Path) -> Path:
    if path.is_dir():
        for name in FOLDER_FILES:
            if (path / name).is_file():
                return path / name
        raise CheckpointError(
            f"the folder {path} contains no checkpoint", allowed=", ".join(FOLDER_FILES)
        )
    if not path.is_file():
        raise CheckpointError(
            f"there is no checkpoint at {path}",
            hint="Weights are not downloaded: give the path of a local file.",
        )
    return path


def _first_bytes(file: Path) -> bytes:
    try:
        with file.open("rb") as stream:
            start = stream.read(64)
    except OSError as error:
        raise CheckpointError(f"{file} cannot be opened", got=error.strerror) from error
    if not start:
        raise CheckpointError(f"{file} is empty", hint="Copy or download it again.")
    return start


def _is_safetensors(start: bytes) -> bool:
    # Eight bytes of header length (the format allows 100 MB), then the header in JSON.
    return start[8:9] == b"{" and 2 <= int.from_bytes(start[:8], "little") <= 100_000_000


def _read_safetensors(file: Path) -> dict[str, Tensor]:
    try:
        with safe_open(file, framework="pt") as stream:
            # Without clone(), the tensors map the file and break when it changes.
            return {name: stream.get_tensor(name).clone() for name in stream.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise _damaged(file, error) from error


def _read_pytorch(
    file: Path, start: bytes, ignore_objects: bool, allow_pickle: bool
) -> tuple[Any, list[str]]:
    """Return the content, and the names of classes replaced by placeholders."""
    if allow_pickle:
        return _torch_load(file, weights_only=False), []
    # Only in the zip format can the names be listed without unpickling.
    if start[:2] == b"PK":
        try:
            names = sorted(torch.serialization.get_unsafe_globals_in_checkpoint(str(file)))
        except Exception as error:  # PyTorch raises about a dozen types for damaged archives.
            raise _damaged(file, error) from error
        if names and not ignore_objects:
            raise _contains_objects(file, names)
    if not ignore_objects:
        return _torch_load(file, weights_only=True), []
    replaced: list[str] = []
    restricted = make_pickle_module(replaced)
    return _torch_load(file, weights_only=False, pickle_module=restricted), sorted(replaced)


def _torch_load(file: Path, **options: Any) -> Any:
    try:
        return torch.load(file, map_location="cpu", **options)
    except (CheckpointError, MemoryError):
        raise
    except ImportError as error:
        raise CheckpointError(
            f"{file} contains objects of a package that is not installed",
            got=str(error),
            hint="Use ignore_objects=True, which imports no package.",
        ) from error
    except Exception as error:  # PyTorch raises about a dozen types for damaged files.
        if options["weights_only"] and "nsupported" in str(error):
            raise _contains_objects(file, []) from error
        raise _damaged(file, error) from error


def _damaged(file: Path, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"{file} is truncated, damaged or not a checkpoint",
        got=str(error).splitlines()[0] if str(error) else type(error).__name__,
        hint="Compare its size with the source, and copy or download it again.",
    )


def _contains_objects(file: Path, names: list[str]) -> CheckpointError:
    allowed = "tensors and plain values"
    malicious = [name for name in names if is_malicious(*name.rpartition(".")[::2])]
    if malicious:
        return CheckpointError(
            f"{file} asks to run {', '.join(malicious)}",
            allowed=allowed,
            hint="A genuine checkpoint never does: do not open this file.",
        )
    return CheckpointError(
        f"{file} contains Python objects next to the weights, as training checkpoints do; "
        "unpickling them can run any code",
        got=", ".join(names) or None,
        allowed=allowed,
        hint="Use ignore_objects=True to skip the objects and read the weights (runs no code), or "
        "in Python allow_pickle=True if you trust the source of the file.",
    )


def _read_shards(index: Path, ignore_objects: bool, allow_pickle: bool) -> dict[str, Tensor]:
    try:
        names = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        shards = sorted(set(names))
        valid = all(isinstance(name, str) for name in shards)
    except OSError as error:
        raise CheckpointError(f"{index} cannot be read", got=error.strerror) from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        valid = False
    if not valid:
        raise CheckpointError(
            f"{index} is not an index of a sharded checkpoint", allowed='JSON with a "weight_map"'
        )
    tensors: dict[str, Tensor] = {}
    for name in shards:
        # A shard that is an index, or its folder, might be read for ever.
        if not name or Path(name).name != name or name == ".." or name.endswith(_INDEX):
            raise CheckpointError(
                f"{index} names a shard outside its folder, or an index",
                got=repr(name),
                allowed="plain file names",
            )
        shard = read_tensors(
            index.parent / name, ignore_objects=ignore_objects, allow_pickle=allow_pickle
        )
        tensors.update(shard.tensors)
    return tensors
