"""What the importers hand to the compiler."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from dcnv3_tvm.signature import Entry

if TYPE_CHECKING:
    import numpy as np
    import tvm


@dataclasses.dataclass(frozen=True)
class ImportedModel:
    """A model in Relax, with its weights beside it.

    Parameters
    ----------
    name : str
        For example ``"internimage_t"``; names the artifact.
    module : tvm.IRModule
        One Relax function for each entry, of the entry's name, whose parameters are the entry's
        inputs followed by its weights.
    entries : dict of str to Entry
        ``"main"`` is what the PyTorch module returns; ``"features"``, where present, returns the
        feature pyramid (NCHW maps).
    weights : dict of str to numpy.ndarray
        By their names in the PyTorch state dict; shared by the entries.
    config : dict
        The variant and its configuration, plain values; empty when unknown.
    preprocessing : dict
        How an image becomes the input, plain values; empty when unknown.
    """

    name: str
    module: tvm.IRModule
    entries: dict[str, Entry]
    weights: dict[str, np.ndarray]
    config: dict[str, Any] = dataclasses.field(default_factory=dict)
    preprocessing: dict[str, Any] = dataclasses.field(default_factory=dict)
