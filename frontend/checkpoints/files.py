"""Read the tensors out of a checkpoint file or folder, whatever wrote it, without running its code.

What a file is, is told from its first bytes, not from its name. safetensors hold nothing but
tensors; a PyTorch file is a pickle and is read with ``weights_only=True``, which builds tensors
and plain values and refuses everything else.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dcnv3_tvm.errors import CheckpointError
from dcnv3_tvm.frontend.checkpoints.inert_pickle import is_hostile, make_pickle_module

FOLDER_FILES: Final = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
"""What is looked for in a folder, in this order."""

EMA_NAMES: Final = ("model_ema", "ema", "state_dict_ema")
CONTAINER_NAMES: Final = ("model", "module", "state_dict")
"""Names under which trainers keep the weights, in order of preference."""

_FOREIGN: Final = (
    (b"\x89PNG", "a PNG image"),
    (b"\xff\xd8\xff", "a JPEG image"),
    (b"version https://git-lfs", "a Git LFS pointer, not the file itself"),
    (b"<", "a web page or XML"),
    (b"\x1f\x8b", "a gzip archive"),
    (b"\x7fELF", "a program or library"),
    (b"\x89HDF", "an HDF5 file"),
    (b"\x80", "a Python pickle, which this library does not open"),
)

_OLD_TORCH_FORMAT: Final = b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19"
"""The pickled number with which files from before PyTorch 1.6 begin."""


@dataclasses.dataclass(frozen=True)
class Tensors:
    """The tensors of a checkpoint under the names the file gives them.

    Parameters
    ----------
    tensors : dict of str to Tensor
        On the CPU.
    container : str
        Where in the file they were, for example ``"'model'"``; empty for the whole file.
    ignored : tuple of str
        What the file holds beside them: other entries, and classes replaced by placeholders.
    """

    tensors: dict[str, Tensor]
    container: str = ""
    ignored: tuple[str, ...] = ()


def read_tensors(
    path: str | Path,
    *,
    use_ema: bool = False,
    ignore_objects: bool = False,
    allow_pickle: bool = False,
) -> Tensors:
    """Read a checkpoint.

    Parameters
    ----------
    path : str or Path
        A safetensors file, a PyTorch file (``.pth``, ``.pt``, ``.bin``), the index of a sharded
        one, or a folder that holds one of them under its Hugging Face name.
    use_ema : bool
        Take the averaged weights of a training checkpoint.
    ignore_objects : bool
        Replace objects that are neither tensors nor plain values (a trainer's configuration) by
        empty placeholders. Runs no code of the file.
    allow_pickle : bool
        Unpickle the file without restrictions, **which runs any code the file holds**.

    Raises
    ------
    CheckpointError
        If the file cannot be read, is something else, or holds no tensors by name.
    """
    file = _locate(Path(path))
    start = _first_bytes(file)
    try:
        if file.name.endswith(".index.json"):
            data: Any = _read_shards(file, ignore_objects, allow_pickle)
            ignored: list[str] = []
        elif _is_safetensors(start):
            data, ignored = _read_safetensors(file), []
        elif start[:2] == b"PK" or _OLD_TORCH_FORMAT in start:
            data, ignored = _read_pytorch(file, start, ignore_objects, allow_pickle)
        else:
            found = next((words for magic, words in _FOREIGN if start.startswith(magic)), None)
            raise CheckpointError(
                f"{file} is no checkpoint",
                got=found or f"a file that begins with {start[:8]!r}",
                allowed="safetensors, or a file written by torch.save",
            )
    except SafetensorError as error:
        raise _damaged(file, error) from error
    return _choose_container(file, data, use_ema, ignored)


def _locate(path: Path) -> Path:
    if path.is_dir():
        for name in FOLDER_FILES:
            if (path / name).is_file():
                return path / name
        raise CheckpointError(
            f"the folder {path} holds no checkpoint", allowed=", ".join(FOLDER_FILES)
        )
    if not path.is_file():
        raise CheckpointError(
            f"there is no checkpoint at {path}",
            hint="Weights are not downloaded: give the path of a file you have.",
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
    with safe_open(file, framework="pt") as stream:
        # Tensors as they come are a view of the file, and would change or crash with it.
        return {name: stream.get_tensor(name).clone() for name in stream.keys()}  # noqa: SIM118


def _damaged(file: Path, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"{file} is truncated, damaged or no checkpoint",
        got=str(error).splitlines()[0] if str(error) else type(error).__name__,
        hint="Compare its size with the source, and copy or download it again.",
    )


def _read_pytorch(
    file: Path, start: bytes, ignore_objects: bool, allow_pickle: bool
) -> tuple[Any, list[str]]:
    replaced: list[str] = []
    if allow_pickle:
        return _torch_load(file, weights_only=False), replaced
    # Only the zip format can be searched for the names without unpickling it.
    if start[:2] == b"PK":
        try:
            foreign = sorted(torch.serialization.get_unsafe_globals_in_checkpoint(str(file)))
        except Exception as error:  # A damaged archive fails in any of a dozen ways.
            raise _damaged(file, error) from error
        if foreign and not ignore_objects:
            raise _objects_inside(file, foreign)
    if ignore_objects:
        inert = make_pickle_module(replaced)
        return _torch_load(file, weights_only=False, pickle_module=inert), sorted(replaced)
    return _torch_load(file, weights_only=True), replaced


def _torch_load(file: Path, **options: Any) -> Any:
    try:
        return torch.load(file, map_location="cpu", **options)
    except (CheckpointError, MemoryError):
        raise
    except ImportError as error:
        raise CheckpointError(
            f"{file} holds objects of a package that is not installed",
            got=str(error),
            hint="Type ignore_objects=True instead of allow_pickle=True: it needs no package.",
        ) from error
    except Exception as error:  # A damaged or foreign file fails in any of a dozen ways.
        if options["weights_only"] and "nsupported" in str(error):
            raise _objects_inside(file, []) from error
        raise _damaged(file, error) from error


def _objects_inside(file: Path, names: list[str]) -> CheckpointError:
    allowed = "tensors and plain values"
    hostile = [name for name in names if is_hostile(*name.rpartition(".")[::2])]
    if hostile:
        return CheckpointError(
            f"{file} asks to run {', '.join(hostile)}",
            allowed=allowed,
            hint="No honest checkpoint does: do not open it.",
        )
    return CheckpointError(
        f"{file} holds Python objects beside the weights, as a training checkpoint does; reading "
        "them runs code of the file's choice",
        got=", ".join(names) or None,
        allowed=allowed,
        hint="Type ignore_objects=True to read the weights and leave the objects out (runs "
        "nothing), or allow_pickle=True if you trust whoever made the file.",
    )


def _read_shards(index: Path, ignore_objects: bool, allow_pickle: bool) -> dict[str, Tensor]:
    try:
        files = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        shards = sorted({str(name) for name in files.values()})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{index} is no index of a sharded checkpoint", allowed='JSON with a "weight_map"'
        ) from error
    tensors: dict[str, Tensor] = {}
    for name in shards:
        if Path(name).name != name:
            raise CheckpointError(
                f"{index} names a shard outside its folder", got=name, allowed="plain file names"
            )
        shard = read_tensors(
            index.parent / name, ignore_objects=ignore_objects, allow_pickle=allow_pickle
        )
        tensors.update(shard.tensors)
    return tensors


def _choose_container(file: Path, data: Any, use_ema: bool, ignored: list[str]) -> Tensors:
    if not isinstance(data, dict):
        raise CheckpointError(
            f"{file} holds no weights by name",
            got=f"an object of type {type(data).__name__}",
            allowed="a dictionary of tensors, or one that holds it under "
            + ", ".join(repr(name) for name in CONTAINER_NAMES),
        )
    averaged = [name for name in EMA_NAMES if isinstance(data.get(name), dict)]
    if use_ema and not averaged:
        raise CheckpointError(
            f"{file} holds no averaged weights",
            got=_some(data),
            allowed=", ".join(EMA_NAMES),
            hint="Leave use_ema out.",
        )
    wanted = averaged if use_ema else [*CONTAINER_NAMES, *averaged]
    container = next((name for name in wanted if isinstance(data.get(name), dict)), None)
    if container is not None:
        ignored = [*(str(name) for name in data if name != container), *ignored]
    state = data if container is None else data[container]
    tensors = {
        name: value
        for name, value in state.items()
        if isinstance(name, str) and isinstance(value, Tensor)
    }
    if not tensors:
        raise CheckpointError(f"{file} holds no tensors by name", got=_some(state))
    return Tensors(tensors, "" if container is None else repr(container), tuple(ignored))


def _some(names: dict[Any, Any], limit: int = 8) -> str:
    shown = ", ".join(repr(name) for name in list(names)[:limit])
    return f"{shown}, and {len(names) - limit} more" if len(names) > limit else shown or "nothing"
