"""``dcnv3-tvm compile``: compile a model to an artifact."""

from __future__ import annotations

import argparse
import dataclasses
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from dcnv3_tvm.cli.info import tuning_summary
from dcnv3_tvm.cli.result import Result
from dcnv3_tvm.errors import InvalidArgumentError
from dcnv3_tvm.progress import Progress

if TYPE_CHECKING:
    from dcnv3_tvm.imported_model import ImportedModel

HELP: Final = "compile a model to an artifact, which runs without PyTorch"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument(
        "model",
        help="name listed by `models`, or a checkpoint file whose name starts with one",
    )
    parser.add_argument(
        "-o", "--output", type=Path, required=True, metavar="DIR", help="artifact folder to write"
    )
    parser.add_argument("--force", action="store_true", help="replace an existing artifact")
    add_weights(parser)
    parser.add_argument(
        "--target",
        default="auto",
        help="auto (this machine's CPU), cuda (its GPU), cpu-znver4, cuda-sm90, ... "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--dtype",
        default="float32",
        help="element type of matmul operands: float32, bfloat16, or on GPUs float16 "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--database",
        default="default",
        metavar="DIR",
        help="tuning records: default (shipped with this package), none, or a folder written by "
        "`dcnv3-tvm tune` (default: %(default)s)",
    )
    parser.add_argument(
        "--no-cuda-graph",
        action="store_true",
        help="on a GPU, launch kernels one by one instead of as a CUDA graph",
    )
    parser.add_argument("--batch", type=int, default=1, help="batch size (default: %(default)s)")
    parser.add_argument("--dynamic-batch", action="store_true", help="accept any batch size")
    parser.add_argument("--dynamic-size", action="store_true", help="accept any image size")
    parser.add_argument(
        "--size",
        type=parse_size,
        metavar="HxW",
        help="image size (default: the model's resolution)",
    )
    parser.add_argument(
        "--features-only",
        action="store_true",
        help="return four feature maps instead of logits",
    )
    parser.add_argument(
        "--debug-dump", type=Path, metavar="DIR", help="write the module after each phase to DIR"
    )


def add_weights(parser: argparse.ArgumentParser) -> None:
    """Declare the options for weights."""
    weights = parser.add_mutually_exclusive_group()
    weights.add_argument(
        "--checkpoint", type=Path, metavar="FILE", help="weights (.safetensors, .pth or .bin)"
    )
    weights.add_argument(
        "--random-weights", type=int, metavar="SEED", help="use random weights, for trials"
    )


def execute(arguments: argparse.Namespace) -> Result:
    """Compile the model and write the artifact."""
    from dcnv3_tvm.runtime.model import check_replaceable

    name, checkpoint = _model_and_checkpoint(arguments)
    _check_sizes(arguments)
    check_replaceable(arguments.output)
    if arguments.output.exists() and any(arguments.output.iterdir()) and not arguments.force:
        raise InvalidArgumentError(
            "the output folder already holds an artifact",
            got=arguments.output,
            hint="Use --force to replace it.",
        )
    _check_compilation(name, arguments)
    with Progress(f"compile {name}") as progress:
        progress.step("build PyTorch model")
        imported = _import(name, checkpoint, arguments, progress)
        from dcnv3_tvm.compiler.compile import compile_artifact

        metadata = compile_artifact(
            imported,
            arguments.output,
            target=arguments.target,
            dtype=arguments.dtype,
            database=arguments.database,
            cuda_graph=not arguments.no_cuda_graph,
            debug_dump=arguments.debug_dump,
            on_phase=progress.step,
        )
    seconds = progress.seconds
    size = sum(path.stat().st_size for path in arguments.output.iterdir())
    data = {
        "artifact": str(arguments.output),
        "name": metadata.name,
        "target": metadata.target.slug,
        "dtype": metadata.dtype,
        "bytes": size,
        "seconds": round(seconds, 2),
        "records": metadata.records,
        "entries": {entry: value.to_json() for entry, value in metadata.entries.items()},
    }
    text = (
        f"{arguments.output}: {metadata.name} for {metadata.target.slug}, {metadata.dtype}, "
        f"{size / 1e6:.1f} MB, {seconds:.1f} s; tuning records: {tuning_summary(metadata)}"
    )
    return Result(data, text)


def _check_compilation(name: str, arguments: argparse.Namespace) -> None:
    """Raise the compiler's errors early, before the model is built and imported."""
    from dcnv3_tvm.compiler.compile import check_dtype
    from dcnv3_tvm.frontend.models.variants import model_config
    from dcnv3_tvm.schedules.records import find_records
    from dcnv3_tvm.targets import resolve_target

    if arguments.dynamic_size and not arguments.features_only:
        model_config(name).check_dynamic_size()
    target = resolve_target(arguments.target)
    check_dtype(arguments.dtype, target)
    find_records(target, arguments.database)


def _import(
    name: str, checkpoint: Path | None, arguments: argparse.Namespace, progress: Progress
) -> ImportedModel:
    from dcnv3_tvm import frontend
    from dcnv3_tvm.frontend.models.variants import model_config

    model = frontend.create_model(
        name, checkpoint=checkpoint, features_only=arguments.features_only
    )
    if arguments.random_weights is not None:
        from dcnv3_tvm.verify.random_weights import randomize_

        randomize_(model, arguments.random_weights)
    resolution = model_config(name).resolution
    height, width = arguments.size or (resolution, resolution)
    progress.step("import into Relax")
    imported = frontend.import_model(
        model,
        example=(arguments.batch, 3, height, width),
        dynamic_batch=arguments.dynamic_batch,
        dynamic_size=arguments.dynamic_size,
    )
    return dataclasses.replace(
        imported, preprocessing=_preprocessing(imported.preprocessing, height, width)
    )


def _preprocessing(settings: dict[str, Any], height: int, width: int) -> dict[str, Any]:
    """Set the crop to the compiled image size."""
    if not settings or settings["crop"] == [height, width]:
        return settings
    return settings | {"resize": max(height, width), "crop": [height, width]}


def _model_and_checkpoint(arguments: argparse.Namespace) -> tuple[str, Path | None]:
    from dcnv3_tvm.frontend.models.variants import list_models, model_config

    path = Path(arguments.model)
    if not path.suffix and not path.is_file():
        return model_config(arguments.model).variant, arguments.checkpoint
    if arguments.checkpoint is not None or arguments.random_weights is not None:
        raise InvalidArgumentError(
            "weights are specified twice",
            got=f"{arguments.model} and --checkpoint or --random-weights",
            allowed="a model name with one of these options, or a checkpoint without them",
        )
    for name in list_models():
        if re.match(rf"{name}(?![a-z])", path.name.lower()):
            return name, path
    raise InvalidArgumentError(
        "the checkpoint's file name does not start with a model name",
        got=path.name,
        hint=f"Name the model: dcnv3-tvm compile internimage_t --checkpoint {path} -o DIR",
    )


def _check_sizes(arguments: argparse.Namespace) -> None:
    if arguments.batch < 1:
        raise InvalidArgumentError(
            "--batch is out of range", got=arguments.batch, allowed="1 or more"
        )
    if arguments.checkpoint is not None and not arguments.checkpoint.exists():
        raise InvalidArgumentError("the checkpoint does not exist", got=arguments.checkpoint)


def parse_size(text: str) -> tuple[int, int]:
    """Parse ``HxW``, or one number for both, for argparse."""
    match = re.fullmatch(r"(\d+)(?:[xX](\d+))?", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 384x512 or 224")
    return int(match[1]), int(match[2] or match[1])
