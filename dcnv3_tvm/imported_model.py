"""A model as the importers pass it to the compiler."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from dcnv3_tvm.signature import Entry

if TYPE_CHECKING:
    import numpy as np
    import tvm


@dataclasses.dataclass(frozen=True)
class ImportedModel:
    """A Relax module with its weights and the signatures of its functions.

    Parameters
    ----------
    name : str
        For example ``"internimage_t"``; becomes the name of the artifact.
    module : tvm.IRModule
        One Relax function for each entry, with the entry's name. Its parameters are the entry's
        inputs in `TensorInfo.kernel_shape`, followed by its weights.
    entries : dict of str to Entry
        ``"main"`` returns what the original model returns; ``"features"``, where present, returns
        the feature pyramid (NCHW maps).
    weights : dict of str to numpy.ndarray
        By name, as in the PyTorch state dict; shared by the entries.
    config : dict
        Variant and configuration as plain values; empty if unknown.
    preprocessing : dict
        How an image becomes the first input, as plain values; empty if unknown.
    labels : tuple of str
        Names of the classes; empty if unknown.
    """

    name: str
    module: tvm.IRModule
    entries: dict[str, Entry]
    weights: dict[str, np.ndarray]
    config: dict[str, Any] = dataclasses.field(default_factory=dict)
    preprocessing: dict[str, Any] = dataclasses.field(default_factory=dict)
    labels: tuple[str, ...] = ()
