"""Load published, trained and converted weights into an `InternImage`, and report every key."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from dcnv3_tvm.errors import CheckpointError
from dcnv3_tvm.frontend.checkpoints.files import Tensors, read_tensors
from dcnv3_tvm.frontend.models.internimage import InternImage
from dcnv3_tvm.frontend.models.variants import VARIANTS, InternImageConfig

ANCHOR: Final = "patch_embed.conv1.weight"
"""The key that every InternImage has, and that tells the prefix of all others."""

USUAL_PREFIXES: Final = ("module.", "model.", "backbone.")

HEAD_PREFIXES: Final = (
    "conv_head.",
    "head.",
    "dcnv3_head_x4.",
    "dcnv3_head_x3.",
    "clip_projector.",
    "fc_norm.",
)

_SHOWN = 8


@dataclasses.dataclass(frozen=True)
class LoadReport:
    """What became of every key.

    Parameters
    ----------
    path : str
        The file.
    source : str
        Container and prefix the weights had in it.
    loaded : int
        Tensors taken over.
    missing : tuple of str
        Keys of the model that the checkpoint lacks.
    unexpected : tuple of str
        Keys of the checkpoint's InternImage that the model has no place for.
    wrong_shape : tuple of str
        Keys of another shape, with both shapes.
    skipped : tuple of str
        Keys that belong to another part of a larger model (a detector's heads) or to a
        classification head the model was built without.
    ignored : tuple of str
        What else the file holds: other containers, objects.
    """

    path: str
    source: str
    loaded: int
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    wrong_shape: tuple[str, ...] = ()
    skipped: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()

    @property
    def complete(self) -> bool:
        """Whether the weights fit the model exactly."""
        return not (self.missing or self.unexpected or self.wrong_shape)

    def __str__(self) -> str:
        lines = [f"{self.loaded} tensors from {self.path}" + (self.source and f" ({self.source})")]
        lines += [
            f"{label}: {_some(keys)}"
            for label, keys in (
                ("missing", self.missing),
                ("unexpected", self.unexpected),
                ("wrong shape", self.wrong_shape),
            )
            if keys
        ]
        if self.skipped:
            parts = Counter(key.split(".")[0] for key in self.skipped)
            lines.append("skipped: " + ", ".join(f"{part}.* ({n})" for part, n in parts.items()))
        if self.ignored:
            lines.append(f"ignored: {_some(self.ignored)}")
        return "\n".join(lines)


def load_checkpoint(
    model: InternImage,
    path: str | Path,
    *,
    strict: bool = True,
    use_ema: bool = False,
    ignore_objects: bool = False,
    allow_pickle: bool = False,
) -> LoadReport:
    """Load weights of any published layout into a model.

    Taken as they are: released files, training checkpoints (also DeepSpeed's), detection and
    segmentation checkpoints, and Hugging Face's files and folders. Values are converted to the
    model's element type.

    Parameters
    ----------
    model : InternImage
        Filled in place; it may be on the meta device, and then takes the tensors themselves.
    path : str or Path
        A file or a folder.
    strict : bool
        Refuse weights that do not fit exactly. Otherwise what fits is loaded; read the report.
    use_ema : bool
        Take the averaged weights of a training checkpoint.
    ignore_objects : bool
        Leave a training checkpoint's Python objects out; runs no code of the file.
    allow_pickle : bool
        Unpickle the file without restrictions, which runs any code it holds.

    Returns
    -------
    LoadReport
        What became of every key.

    Raises
    ------
    CheckpointError
        If the file cannot be read, holds no InternImage, or does not fit. The model is then
        unchanged.
    """
    content = read_tensors(
        path, use_ema=use_ema, ignore_objects=ignore_objects, allow_pickle=allow_pickle
    )
    return load_tensors(model, content, path, strict=strict)


def load_tensors(
    model: InternImage, content: Tensors, path: str | Path, *, strict: bool = True
) -> LoadReport:
    """Load what `read_tensors` gave; parameters and errors as of `load_checkpoint`."""
    tensors, others, prefix = internimage_tensors(content, path)
    own = model.state_dict()
    skipped = [*others, *(key for key in tensors if _without_head(key, model.config))]
    candidates = {key: value for key, value in tensors.items() if key not in set(skipped)}
    fitting = {
        key: value.to(own[key].dtype)
        for key, value in candidates.items()
        if key in own and own[key].shape == value.shape
    }
    loaded = len(fitting)
    for key in own:
        # PyTorch's own loader takes BatchNorm's counter for optional too: inference has no use.
        if key.endswith("num_batches_tracked") and key not in candidates:
            fitting[key] = torch.zeros((), dtype=own[key].dtype)
    where = [f"under {content.container}" if content.container else ""]
    where.append(f"prefix {prefix!r}" if prefix else "")
    report = LoadReport(
        path=str(path),
        source=", ".join(filter(None, where)),
        loaded=loaded,
        missing=tuple(key for key in own if key not in candidates and key not in fitting),
        unexpected=tuple(key for key in candidates if key not in own),
        wrong_shape=tuple(
            f"{key} {tuple(value.shape)}, model {tuple(own[key].shape)}"
            for key, value in candidates.items()
            if key in own and key not in fitting
        ),
        skipped=tuple(skipped),
        ignored=content.ignored,
    )
    on_meta = any(value.is_meta for value in own.values())
    if not report.complete and (strict or on_meta):
        raise _misfit(report, model.config, tensors)
    model.load_state_dict(fitting, strict=False, assign=on_meta)
    return report


def internimage_tensors(
    content: Tensors, path: str | Path
) -> tuple[dict[str, Tensor], list[str], str]:
    """Find the InternImage among the tensors: its weights by published key, other keys, prefix.

    Raises
    ------
    CheckpointError
        If there is none, or more than one.
    """
    prefixes = [key.removesuffix(ANCHOR) for key in content.tensors if key.endswith(ANCHOR)]
    prefixes = [prefix for prefix in prefixes if not prefix or prefix.endswith(".")]
    usual = "|".join(re.escape(prefix) for prefix in USUAL_PREFIXES)
    preferred = [prefix for prefix in prefixes if re.fullmatch(f"(?:{usual})*", prefix)]
    if len(prefixes) > 1 and len(preferred) == 1:
        prefixes = preferred
    if not prefixes:
        raise CheckpointError(
            f"{path} holds no InternImage: no key ends in {ANCHOR}",
            got=f"keys {_some(content.tensors)}",
        )
    if len(prefixes) > 1:
        raise CheckpointError(
            f"{path} holds more than one InternImage",
            got=f"prefixes {', '.join(map(repr, prefixes))}",
            allowed="one",
            hint="Save the wanted one alone: its keys, under 'model', with torch.save.",
        )
    prefix = prefixes[0]
    tensors = {
        # Hugging Face's conversion renamed the layer scale.
        re.sub(r"\.layer_scale([12])$", r".gamma\1", key.removeprefix(prefix)): value
        for key, value in content.tensors.items()
        if key.startswith(prefix)
    }
    others = [key for key in content.tensors if not key.startswith(prefix)]
    return tensors, others, prefix


def has_layer_scale(content: Tensors) -> bool:
    """Whether the checkpoint's blocks carry ``gamma1`` or ``layer_scale1``."""
    return any(key.endswith((".gamma1", ".layer_scale1")) for key in content.tensors)


def _without_head(key: str, config: InternImageConfig) -> bool:
    if config.features_only:
        return key.startswith(HEAD_PREFIXES)
    return config.num_classes == 0 and key.startswith("head.")


def _misfit(
    report: LoadReport, config: InternImageConfig, tensors: dict[str, Tensor]
) -> CheckpointError:
    found = _describe(tensors)
    classes = tensors["head.weight"].shape[0] if "head.weight" in tensors else None
    if found and found != config.variant and config.variant not in found.split(" or "):
        hint = f"The weights look like {found}: create_model({found.split(' or ')[0]!r}, ...)."
    elif classes is not None and classes != config.num_classes and not config.features_only:
        return CheckpointError(
            f"{report.path} classifies into {classes} classes, the model into {config.num_classes}",
            got="; ".join(report.wrong_shape[:_SHOWN]),
            hint=f"Type num_classes={classes} to keep its classes, or num_classes=0 to drop the "
            "last layer and get pooled features.",
        )
    elif any(key.endswith(".gamma1") for key in report.missing):
        hint = "The weights have no layer scale: type layer_scale=None."
    elif any(key.endswith(".gamma1") for key in report.unexpected):
        hint = "The weights have a layer scale: type layer_scale=1.0."
    elif report.missing and all(key.startswith(HEAD_PREFIXES) for key in report.missing):
        hint = "The weights have no classification head: type features_only=True."
    else:
        hint = "Check that variant and options are those the weights were trained with."
    parts = []
    for count, what in (
        (report.missing, "missing"),
        (report.unexpected, "unexpected"),
        (report.wrong_shape, "of another shape"),
    ):
        if count:
            parts.append(f"{len(count)} {what} ({_some(count)})")
    return CheckpointError(
        f"{report.path} does not fit {config.variant}", got="keys " + "; ".join(parts), hint=hint
    )


def _describe(tensors: dict[str, Tensor]) -> str | None:
    """Name the variants whose width and depths the weights have."""
    stem = tensors.get("patch_embed.conv2.weight")
    blocks = Counter(
        match[1]
        for key in tensors
        if (match := re.fullmatch(r"levels\.(\d)\.blocks\.\d+\.norm1\.0\.weight", key))
    )
    depths = tuple(blocks[str(index)] for index in range(4))
    names = [
        name
        for name, config in VARIANTS.items()
        if stem is not None and stem.shape[0] == config.channels and config.depths == depths
    ]
    return " or ".join(names) or None


def _some(keys: Iterable[str]) -> str:
    names = list(keys)
    shown = ", ".join(names[:_SHOWN])
    return f"{shown}, and {len(names) - _SHOWN} more" if len(names) > _SHOWN else shown
