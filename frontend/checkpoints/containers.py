"""Find the state dict of an InternImage in the content of a checkpoint file."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from torch import Tensor

from dcnv3_tvm.errors import CheckpointError
from dcnv3_tvm.frontend.checkpoints.report import shortened

ANCHOR: Final = "patch_embed.conv1.weight"
"""A key of every InternImage; what precedes it is the prefix of all its keys."""

_USUAL_NAMES: Final = (
    "model",
    "module",
    "state_dict",
    "model_state_dict",
    "net",
    "params",
    "weights",
)
"""Keys under which trainers store the weights."""

_MMENGINE: Final = ("state_dict", "ema_state_dict", "steps")
"""Where mmengine stores the averaged weights, the others, and a counter among the latter.

Its EMAHook exchanges the two when it saves, so that the usual key has the averaged weights.
"""


@dataclasses.dataclass(frozen=True)
class CheckpointTensors:
    """The tensors of a checkpoint, under the keys of the file.

    Parameters
    ----------
    tensors : dict of str to Tensor
        On the CPU.
    container : str
        Where in the file they were, for example ``"'model'"``; empty for the top level.
    ignored : tuple of str
        Other entries of the file, and classes replaced by placeholders.
    """

    tensors: dict[str, Tensor]
    container: str = ""
    ignored: tuple[str, ...] = ()


def select_container(
    file: Path, data: Any, *, use_ema: bool, ignored: tuple[str, ...]
) -> CheckpointTensors:
    """Find the state dict in the content of a file.

    Parameters
    ----------
    file : Path
        The file, for errors.
    data : object
        Its content.
    use_ema : bool
        Whether the averaged weights are wanted.
    ignored : tuple of str
        What was left out when the file was read.

    Raises
    ------
    CheckpointError
        If there is no state dict, or several hold an InternImage.
    """
    if not isinstance(data, dict):
        raise CheckpointError(
            f"{file} contains no named weights",
            got=f"an object of type {type(data).__name__}",
            allowed="a dictionary of tensors, at the top level or under "
            + ", ".join(repr(name) for name in _USUAL_NAMES),
        )
    container = _container(file, data, use_ema)
    state = data if container is None else data[container]
    tensors = _tensors(state)
    if not tensors:
        raise CheckpointError(f"{file} contains no named tensors", got=shortened(map(repr, state)))
    if container is None:
        return CheckpointTensors(tensors, "", ignored)
    others = (str(name) for name in data if name != container)
    return CheckpointTensors(tensors, repr(container), (*others, *ignored))


def _container(file: Path, data: dict[Any, Any], use_ema: bool) -> str | None:
    """Return the key of the state dict; None for the top level."""
    dicts = [
        name for name, value in data.items() if isinstance(name, str) and isinstance(value, dict)
    ]
    averaged = [name for name in dicts if re.search(r"(^|_)ema(_|$)", name)]
    usual, raw, counter = _MMENGINE
    if usual in dicts and raw in averaged and counter in data[raw]:
        return usual
    if use_ema and not averaged:
        raise CheckpointError(
            f"{file} contains no averaged weights",
            got=shortened(map(repr, data)),
            allowed="'model_ema', 'ema', 'state_dict_ema', 'ema_state_dict' and the like",
            hint="Read it with use_ema=False.",
        )
    if not use_ema and _holds_internimage(data):
        return None
    others = [name for name in dicts if name not in averaged]
    candidates = averaged if use_ema else others
    found = [name for name in candidates if _holds_internimage(data[name])]
    if not found and not use_ema:
        found = [name for name in averaged if _holds_internimage(data[name])]
    if len(found) > 1:
        raise CheckpointError(
            f"{file} contains more than one InternImage",
            got=f"under {', '.join(map(repr, found))}",
            allowed="one",
            hint="Save one of them to a file of its own: "
            f"torch.save(torch.load(FILE)[{found[0]!r}], NEW).",
        )
    # Without an InternImage, the error lists the keys of what probably are the weights.
    probable = [name for name in (*_USUAL_NAMES, *averaged) if name in candidates]
    return next(iter((*found, *probable)), None)


def _holds_internimage(state: Mapping[Any, Any]) -> bool:
    return any(key.endswith(ANCHOR) for key in _tensors(state))


def _tensors(state: Mapping[Any, Any]) -> dict[str, Tensor]:
    return {
        name: value
        for name, value in state.items()
        if isinstance(name, str) and isinstance(value, Tensor)
    }
