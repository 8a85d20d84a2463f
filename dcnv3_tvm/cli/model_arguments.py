"""Arguments that name a model and its weights, and the model that they describe."""

from __future__ import annotations

import argparse
import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dcnv3_tvm.cli.arguments import parse_natural, parse_path
from dcnv3_tvm.errors import InvalidArgumentError

if TYPE_CHECKING:
    from torch import Tensor

    from dcnv3_tvm.frontend.models.internimage import InternImage


def add_model(parser: argparse.ArgumentParser, *, others: str = "") -> None:
    """Declare the model and the options of its construction; `others` names further kinds."""
    parser.add_argument(
        "model",
        help="name listed by `models`, or a checkpoint: a file, or a folder as from Hugging Face"
        f"{others}",
    )
    add_weights(parser)
    parser.add_argument(
        "--num-classes",
        type=parse_natural,
        metavar="N",
        help="logits of a fine-tuned model; 0 for pooled features (default: as in a checkpoint "
        "that is named without a model, else the model's own)",
    )
    parser.add_argument(
        "--layer-scale",
        type=_parse_layer_scale,
        default="auto",
        metavar="X",
        help="a number, none, or auto to follow the checkpoint (default: %(default)s)",
    )
    parser.add_argument(
        "--features-only",
        action="store_true",
        help="return feature maps instead of logits, as a detection checkpoint does that is "
        "named without a model",
    )
    parser.add_argument(
        "--out-indices",
        type=_parse_indices,
        default=(0, 1, 2, 3),
        metavar="I,I",
        help="stages whose maps --features-only returns (default: 0,1,2,3)",
    )


def add_weights(parser: argparse.ArgumentParser) -> None:
    """Declare the options for weights."""
    weights = parser.add_mutually_exclusive_group()
    weights.add_argument(
        "--checkpoint",
        type=parse_path,
        metavar="FILE",
        help="weights: a .safetensors, .pth or .bin file, or a folder as from Hugging Face",
    )
    weights.add_argument(
        "--random-weights",
        type=parse_natural,
        metavar="SEED",
        help="random weights, for trials",
    )
    parser.add_argument(
        "--use-ema", action="store_true", help="averaged weights (EMA) of a training checkpoint"
    )
    parser.add_argument(
        "--ignore-objects",
        action="store_true",
        help="skip the Python objects in a training checkpoint, and run no code from it",
    )


def find_model(arguments: argparse.Namespace) -> tuple[str, Path | None]:
    """Return the name of the model that was asked for, and its checkpoint.

    Raises
    ------
    InvalidArgumentError
        If there is no such model, or its weights are specified twice or not at all.
    CheckpointError
        If a checkpoint is of no single variant.
    """
    from dcnv3_tvm.frontend.models.variants import VARIANTS, model_config

    path = Path(arguments.model)
    is_file = path.is_file() or (path.is_dir() and arguments.model not in VARIANTS)
    if not (is_file or path.suffix):
        if arguments.checkpoint is None and arguments.random_weights is None:
            name = model_config(arguments.model).variant
            raise InvalidArgumentError(
                f"{name} has no weights",
                allowed="--checkpoint FILE, or for trials --random-weights SEED",
                hint="A new model deforms nothing: its offset projections are zero.",
            )
        return model_config(arguments.model).variant, arguments.checkpoint
    if arguments.checkpoint is not None or arguments.random_weights is not None:
        raise InvalidArgumentError(
            "weights are specified twice",
            got=f"{arguments.model} and --checkpoint or --random-weights",
            allowed="a model name with one of these options, or a checkpoint without them",
        )
    return _name_in(path) or _variant_of(path, arguments), path


def create(
    name: str, checkpoint: Path | None, arguments: argparse.Namespace, **options: Any
) -> InternImage:
    """Create a model with the weights that were asked for.

    Parameters
    ----------
    name : str
        The variant.
    checkpoint : Path or None
        Its weights, unless ``--random-weights`` is given.
    arguments : argparse.Namespace
        Those of `add_weights`.
    **options
        Of `dcnv3_tvm.frontend.create_model`.
    """
    from dcnv3_tvm import frontend

    model = frontend.create_model(
        name,
        checkpoint=checkpoint,
        use_ema=arguments.use_ema,
        ignore_objects=arguments.ignore_objects,
        **options,
    )
    if arguments.random_weights is not None:
        from dcnv3_tvm.verify.random_weights import randomize_

        randomize_(model, arguments.random_weights)
    return model


def create_described(
    name: str, checkpoint: Path | None, arguments: argparse.Namespace
) -> InternImage:
    """Create the model that the options of `add_model` describe.

    A checkpoint that is named without a model has the classes of its head, and returns feature
    maps if it has none.
    """
    from dcnv3_tvm.frontend.checkpoints.layouts import has_head, number_of_classes

    num_classes, features_only = arguments.num_classes, arguments.features_only
    if checkpoint is not None and arguments.checkpoint is None:
        tensors = _internimage_in(checkpoint, arguments)
        features_only = features_only or (num_classes is None and not has_head(tensors))
        if num_classes is None and not features_only:
            num_classes = number_of_classes(tensors)
    return create(
        name,
        checkpoint,
        arguments,
        num_classes=num_classes,
        layer_scale=arguments.layer_scale,
        features_only=features_only,
        out_indices=arguments.out_indices,
    )


def describe_weights(checkpoint: Path | None, arguments: argparse.Namespace) -> str:
    """Say where the weights come from, for the artifact."""
    if checkpoint is None:
        return f"random weights (seed {arguments.random_weights})"
    return checkpoint.name + (" (averaged)" if arguments.use_ema else "")


def _name_in(path: Path) -> str | None:
    """Return the model that a file name such as mask_rcnn_internimage_t_fpn_1x_coco.pth names."""
    from dcnv3_tvm.frontend.models.variants import VARIANTS

    # A variant for tests contains no other's name; the longest is the most specific.
    for name in sorted(VARIANTS, key=len, reverse=True):
        if re.search(rf"(?<![a-z]){name}(?![a-z])", path.name.lower()):
            return name
    return None


def _variant_of(path: Path, arguments: argparse.Namespace) -> str:
    """Return the variant whose width and depths the weights have."""
    from dcnv3_tvm.errors import CheckpointError
    from dcnv3_tvm.frontend.checkpoints.layouts import matching_variants

    found = matching_variants(_internimage_in(path, arguments))
    if len(found) == 1:
        return found[0]
    raise CheckpointError(
        "neither the checkpoint's name nor its weights tell the model",
        got=f"{path}, " + (f"which fits {' and '.join(found)}" if found else "which fits none"),
        hint=f"Name the model: dcnv3-tvm compile internimage_t --checkpoint {path} -o DIR",
    )


def _internimage_in(path: Path, arguments: argparse.Namespace) -> dict[str, Tensor]:
    from dcnv3_tvm.frontend.checkpoints.layouts import find_internimage
    from dcnv3_tvm.frontend.checkpoints.read import read_tensors

    content = read_tensors(path, use_ema=arguments.use_ema, ignore_objects=arguments.ignore_objects)
    return find_internimage(content, path).tensors


def _parse_layer_scale(text: str) -> float | str | None:
    if text in ("auto", "none"):
        return None if text == "none" else text
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number, none or auto")
    return value


def _parse_indices(text: str) -> tuple[int, ...]:
    if not re.fullmatch(r"[0-3](,[0-3])*", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of stages, such as 1,2,3")
    return tuple(map(int, text.split(",")))
