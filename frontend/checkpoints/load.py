"""Load a checkpoint into an `InternImage`."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from dcnv3_tvm.errors import CheckpointError
from dcnv3_tvm.frontend.checkpoints.containers import CheckpointTensors
from dcnv3_tvm.frontend.checkpoints.layouts import (
    HEAD_PREFIXES,
    find_internimage,
    matching_variants,
    number_of_classes,
)
from dcnv3_tvm.frontend.checkpoints.read import read_tensors
from dcnv3_tvm.frontend.checkpoints.report import LoadReport, shortened
from dcnv3_tvm.frontend.models.config import InternImageConfig
from dcnv3_tvm.frontend.models.internimage import InternImage


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

    Supported are released files, training checkpoints (DeepSpeed's too), detection and
    segmentation checkpoints, and Hugging Face files and folders. Values are converted to the
    model's dtype.

    Parameters
    ----------
    model : InternImage
        Receives the weights in place; on the meta device, its parameters become the loaded
        tensors.
    path : str or Path
        A file or a folder.
    strict : bool
        Raise an error unless the weights fit exactly. Otherwise load what fits; see the report.
    use_ema : bool
        Load the averaged weights (EMA) of a training checkpoint. A checkpoint of mmengine has them
        where the others usually are, so they are loaded in any case.
    ignore_objects : bool
        Skip the Python objects of a training checkpoint; runs no code from the file.
    allow_pickle : bool
        Unpickle the file without restrictions, which runs any code it contains.

    Returns
    -------
    LoadReport
        What happened to each key.

    Raises
    ------
    CheckpointError
        If the file cannot be read, contains no InternImage or several, has NaN, infinite or complex
        weights, or does not fit. The model is then unchanged.
    """
    content = read_tensors(
        path, use_ema=use_ema, ignore_objects=ignore_objects, allow_pickle=allow_pickle
    )
    return load_tensors(model, content, path, strict=strict)


def load_tensors(
    model: InternImage, content: CheckpointTensors, path: str | Path, *, strict: bool = True
) -> LoadReport:
    """Load what `read_tensors` returned; parameters and errors as in `load_checkpoint`."""
    tensors, other_keys, prefix = find_internimage(content, path)
    own = model.state_dict()
    skipped = [*other_keys, *(key for key in tensors if _is_unused_head(key, model.config))]
    candidates = {key: value for key, value in tensors.items() if key not in set(skipped)}
    fitting = {
        key: _converted(key, value, own[key].dtype, path)
        for key, value in candidates.items()
        if key in own and own[key].shape == value.shape
    }
    loaded = len(fitting)
    for key in own:
        # BatchNorm's counter is optional, as in PyTorch: inference does not read it.
        if key.endswith("num_batches_tracked") and key not in candidates:
            fitting[key] = torch.zeros((), dtype=own[key].dtype)
    source = [f"under {content.container}" if content.container else ""]
    source.append(f"prefix {prefix!r}" if prefix else "")
    report = LoadReport(
        path=str(path),
        source=", ".join(filter(None, source)),
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
        raise _mismatch(report, model.config, tensors)
    model.load_state_dict(fitting, strict=False, assign=on_meta)
    return report


def _converted(key: str, value: Tensor, dtype: torch.dtype, path: str | Path) -> Tensor:
    """Convert a weight to the model's dtype, and check that its values can be weights."""
    if value.layout != torch.strided or value.is_quantized or value.is_meta:
        kind = "without data" if value.is_meta else "sparse or quantised"
        raise _unusable(key, path, f"a tensor that is {kind}")
    if not dtype.is_floating_point:
        return value.to(dtype)
    if not value.dtype.is_floating_point:
        raise _unusable(key, path, f"values of {value.dtype}")
    value = value.to(dtype)
    if value.numel() and not torch.stack(torch.aminmax(value)).isfinite().all():
        raise _unusable(key, path, "NaN or infinite values")
    return value


def _unusable(key: str, path: str | Path, found: str) -> CheckpointError:
    return CheckpointError(
        f"{key} in {path} cannot be used as a weight",
        got=found,
        allowed="finite real floating-point values",
        hint="Check how the checkpoint was made: its training may have diverged.",
    )


def _is_unused_head(key: str, config: InternImageConfig) -> bool:
    if config.features_only:
        return key.startswith(HEAD_PREFIXES)
    return config.num_classes == 0 and key.startswith("head.")


def _mismatch(
    report: LoadReport, config: InternImageConfig, tensors: dict[str, Tensor]
) -> CheckpointError:
    """Return the error for weights that do not fit, with the most likely fix as its hint."""
    variants = matching_variants(tensors)
    classes = number_of_classes(tensors)
    listed = 8
    if variants and config.variant not in variants:
        hint = f"The weights look like {' or '.join(variants)}: choose that model."
        listed = 1  # All keys of another model would hide the hint.
    elif classes and classes != config.num_classes and not config.features_only:
        return CheckpointError(
            f"{report.path} has {classes} classes, the model has {config.num_classes}",
            got=shortened(report.wrong_shape),
            hint=f"Use num_classes={classes} to keep its classes, or num_classes=0 to drop the "
            "last layer and get pooled features.",
        )
    elif any(key.endswith(".gamma1") for key in report.missing):
        hint = "The weights have no layer scale: use layer_scale=None."
    elif any(key.endswith(".gamma1") for key in report.unexpected):
        hint = "The weights have a layer scale: use layer_scale=1.0."
    elif report.missing and all(key.startswith(HEAD_PREFIXES) for key in report.missing):
        hint = "The weights have no classification head: use features_only=True."
    else:
        hint = "Use the variant and the options that the weights were trained with."
    counts = [
        f"{len(keys)} {kind} ({shortened(keys, listed)})"
        for keys, kind in (
            (report.missing, "missing"),
            (report.unexpected, "unexpected"),
            (report.wrong_shape, "of another shape"),
        )
        if keys
    ]
    return CheckpointError(
        f"{report.path} does not fit {config.variant}", got="keys " + "; ".join(counts), hint=hint
    )
