"""A model as the importers pass it to the compiler."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from dcnv3_tvm.signature import Entry

if TYPE_CHECKING:
    import numpy as np
    import tvm


@dataclasses.dataclass(frozen=True)
class SamplingCheck:
    """What an importer found out about code of a model that samples as DCNv3 does.

    Parameters
    ----------
    source : str
        A function, or the path and class of a module.
    replaced : bool
        Whether the operator replaces it; otherwise it is imported as it is.
    error : float or None
        Max abs error relative to max|reference| on random inputs; None if it was not compared.
    reason : str
        Why it was not compared.
    """

    source: str
    replaced: bool
    error: float | None = None
    reason: str = ""

    def __str__(self) -> str:
        outcome = "replaced by the operator" if self.replaced else "imported as it is"
        if self.error is None:
            return f"{self.source}: {outcome}, not verified: {self.reason}"
        found = "computes DCNv3" if self.replaced else "does not compute DCNv3"
        return f"{self.source}: {outcome}, {found} (relative error {self.error:.1e})"


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
        the feature pyramid (NCHW maps). Further ones are the same for other image sizes.
    weights : dict of str to numpy.ndarray
        By name, as in the PyTorch state dict; shared by the entries.
    config : dict
        Variant and configuration as plain values; empty if unknown.
    preprocessing : dict
        How an image becomes the first input, as plain values; empty if unknown.
    sizes : dict of str to dict
        For each further image size that has entries, such as ``"384x640"``, its preprocessing.
    labels : tuple of str
        Names of the classes; empty if unknown.
    report : tuple of SamplingCheck
        What was found about each function and module of the original model that samples.
    """

    name: str
    module: tvm.IRModule
    entries: dict[str, Entry]
    weights: dict[str, np.ndarray]
    config: dict[str, Any] = dataclasses.field(default_factory=dict)
    preprocessing: dict[str, Any] = dataclasses.field(default_factory=dict)
    sizes: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    labels: tuple[str, ...] = ()
    report: tuple[SamplingCheck, ...] = ()
