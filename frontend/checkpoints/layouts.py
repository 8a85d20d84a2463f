"""Find the InternImage among the keys of a checkpoint, whatever layout it has."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Final, NamedTuple

from torch import Tensor

from dcnv3_tvm.errors import CheckpointError
from dcnv3_tvm.frontend.checkpoints.containers import ANCHOR, CheckpointTensors
from dcnv3_tvm.frontend.checkpoints.report import shortened
from dcnv3_tvm.frontend.models.variants import VARIANTS

_USUAL_PREFIXES: Final = ("module.", "model.", "backbone.")

HEAD_PREFIXES: Final = (
    "conv_head.",
    "head.",
    "dcnv3_head_x4.",
    "dcnv3_head_x3.",
    "clip_projector.",
    "fc_norm.",
)
"""How the keys of a classification head start."""


class InternImageTensors(NamedTuple):
    """The tensors of a checkpoint, divided into InternImage and the rest.

    Parameters
    ----------
    tensors : dict of str to Tensor
        The InternImage's weights under their published keys.
    other_keys : list of str
        Keys of other parts of the model.
    prefix : str
        What preceded the published keys.
    """

    tensors: dict[str, Tensor]
    other_keys: list[str]
    prefix: str


def find_internimage(content: CheckpointTensors, path: str | Path) -> InternImageTensors:
    """Find the InternImage in a checkpoint and restore its published keys.

    Raises
    ------
    CheckpointError
        If there is none, or more than one.
    """
    prefixes = [key.removesuffix(ANCHOR) for key in content.tensors if key.endswith(ANCHOR)]
    prefixes = [prefix for prefix in prefixes if not prefix or prefix.endswith(".")]
    usual = "|".join(re.escape(prefix) for prefix in _USUAL_PREFIXES)
    preferred = [prefix for prefix in prefixes if re.fullmatch(f"(?:{usual})*", prefix)]
    if len(prefixes) > 1 and len(preferred) == 1:
        prefixes = preferred
    if not prefixes:
        raise CheckpointError(
            f"{path} contains no InternImage: no key ends with {ANCHOR}",
            got=f"keys {shortened(content.tensors)}",
        )
    if len(prefixes) > 1:
        raise CheckpointError(
            f"{path} contains more than one InternImage",
            got=f"prefixes {', '.join(map(repr, prefixes))}",
            allowed="one",
            hint="Save the tensors of one of them to a file of their own with torch.save.",
        )
    prefix = prefixes[0]
    tensors = {
        # Hugging Face's conversion renamed the layer scale.
        re.sub(r"\.layer_scale([12])$", r".gamma\1", key.removeprefix(prefix)): value
        for key, value in content.tensors.items()
        if key.startswith(prefix)
    }
    others = [key for key in content.tensors if not key.startswith(prefix)]
    return InternImageTensors(tensors, others, prefix)


def has_head(tensors: dict[str, Tensor]) -> bool:
    """Whether an InternImage has (a part of) a classification head."""
    return any(key.startswith(HEAD_PREFIXES) for key in tensors)


def number_of_classes(tensors: dict[str, Tensor]) -> int:
    """Return the number of logits of an InternImage with a head; 0 for pooled features."""
    head = tensors.get("head.weight")
    return 0 if head is None else head.shape[0]


def has_layer_scale(content: CheckpointTensors) -> bool:
    """Whether the blocks of a checkpoint have a layer scale."""
    return any(key.endswith((".gamma1", ".layer_scale1")) for key in content.tensors)


def matching_variants(tensors: dict[str, Tensor]) -> list[str]:
    """List the variants with the width and the depths of these weights."""
    stem = tensors.get("patch_embed.conv2.weight")
    if stem is None:
        return []
    blocks = Counter(
        match[1]
        for key in tensors
        if (match := re.fullmatch(r"levels\.(\d)\.blocks\.\d+\.norm1\.0\.weight", key))
    )
    depths = tuple(blocks[str(index)] for index in range(4))
    return [
        name
        for name, config in VARIANTS.items()
        if stem.shape[0] == config.channels and config.depths == depths
    ]
