"""``dcnv3-tvm compile``: compile a model to an artifact."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

from dcnv3_tvm import checks
from dcnv3_tvm.cli.arguments import (
    add_shape,
    image_shapes,
    parse_count,
    parse_path,
    read_labels,
)
from dcnv3_tvm.cli.import_onnx import import_onnx_file
from dcnv3_tvm.cli.info import tuning_summary
from dcnv3_tvm.cli.model_arguments import (
    add_model,
    create_described,
    describe_weights,
    find_model,
)
from dcnv3_tvm.cli.result import Result
from dcnv3_tvm.errors import InvalidArgumentError
from dcnv3_tvm.progress import Progress
from dcnv3_tvm.signature import OFFSETS, TensorInfo

if TYPE_CHECKING:
    from dcnv3_tvm.imported_model import ImportedModel

HELP: Final = "compile a model to an artifact, which runs without PyTorch"
EXAMPLE: Final = "dcnv3-tvm compile internimage_t_1k_224.pth -o artifact"

_BUILD: Final = "build PyTorch model"

_STEPS: Final = {
    _BUILD: 8,
    "import into Relax": 19,
    "imported": 0,
    "convert_layout": 3,
    "fold_weights": 1,
    "fuse_sampling": 0.6,
    "fuse_center_feature": 0.6,
    "lower_layers": 2.4,
    "legalize": 0.3,
    "fuse": 0.6,
    "schedule": 2,
    "build": 13,
    "write": 1.5,
}
"""Seconds that the steps take for InternImage-T and one image size, roughly."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    add_model(parser)
    parser.add_argument(
        "-o",
        "--output",
        type=parse_path,
        required=True,
        metavar="DIR",
        help="artifact folder to write",
    )
    parser.add_argument("--force", action="store_true", help="replace an existing artifact")
    parser.add_argument(
        "--target",
        default="auto",
        help="auto (this machine's CPU), cuda (its GPU), cpu-znver4, cuda-sm90, ..., or another "
        "system: linux-x86_64, linux-aarch64, macos-arm64 or windows-x86_64, also with a processor "
        "of it, such as linux-aarch64:neoverse-n1 (default: %(default)s)",
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
    parser.add_argument(
        "--expose",
        choices=[OFFSETS],
        help="add an entry that returns the offset and mask of each DCNv3, for `visualize`",
    )
    parser.add_argument(
        "--runtime-wheel",
        type=parse_path,
        metavar="WHEEL",
        help="wheel of apache-tvm for another system, whose runtime library the artifact gets "
        "(default: pip downloads it)",
    )
    add_shape(parser, several=True)
    parser.add_argument("--dynamic-batch", action="store_true", help="accept any batch size")
    parser.add_argument(
        "--dynamic-size",
        nargs="?",
        type=parse_count,
        const=1,
        default=0,
        metavar="MULTIPLE",
        help="accept any image size, or only multiples of a number such as 32",
    )
    parser.add_argument(
        "--labels",
        type=parse_path,
        metavar="FILE",
        help="names of the classes, one a line (default: ImageNet-1k's for 1000 classes)",
    )
    parser.add_argument(
        "--debug-dump",
        type=parse_path,
        metavar="DIR",
        help="write the module after each phase to DIR",
    )


def execute(arguments: argparse.Namespace) -> Result:
    """Compile the model and write the artifact."""
    from dcnv3_tvm.runtime.model import check_replaceable

    if arguments.checkpoint is not None and not arguments.checkpoint.exists():
        raise InvalidArgumentError("the checkpoint does not exist", got=arguments.checkpoint)
    check_replaceable(arguments.output)
    if arguments.debug_dump is not None:
        checks.outside("--debug-dump", arguments.debug_dump, arguments.output)
    if arguments.output.exists() and any(arguments.output.iterdir()) and not arguments.force:
        raise InvalidArgumentError(
            "the output folder already holds an artifact",
            got=arguments.output,
            hint="Use --force to replace it.",
        )
    is_onnx = arguments.model.lower().endswith(".onnx")
    name, checkpoint = (arguments.model, None) if is_onnx else find_model(arguments)
    count = len(set(arguments.size or [None]))
    if count > 1 and arguments.dynamic_size:
        raise InvalidArgumentError(
            "a model with a dynamic size accepts any size",
            got="--dynamic-size, and --size more than once",
            allowed="one of them",
        )
    if checkpoint is not None:
        checks.outside("--output", arguments.output, checkpoint)
    if not is_onnx:
        _shapes(name, arguments)  # Raises if one is too large.
    _check_target(arguments)
    steps = {step: each * (1 if step == _BUILD else count) for step, each in _STEPS.items()}
    with Progress(f"compile {name}", steps=steps, quiet=arguments.quiet) as progress:
        if is_onnx:
            progress.step("import into Relax")
            imported = import_onnx_file(arguments)
        else:
            progress.step(_BUILD)
            imported = _import(name, checkpoint, arguments, progress)
        from dcnv3_tvm.compiler.compile import compile_artifact

        metadata = compile_artifact(
            imported,
            arguments.output,
            target=arguments.target,
            dtype=arguments.dtype,
            database=arguments.database,
            cuda_graph=not arguments.no_cuda_graph,
            expose=arguments.expose,
            runtime_wheel=arguments.runtime_wheel,
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
    lines = [
        f"{arguments.output}: {metadata.name} for {metadata.target.slug}, {metadata.dtype}, "
        f"{size / 1e6:.1f} MB, {seconds:.1f} s; tuning records: {tuning_summary(metadata)}",
        *(
            f"{name}: {_tensors(entry.inputs)} -> {_tensors(entry.outputs)}"
            for name, entry in metadata.entries.items()
            if not entry.blocks  # Two outputs of each DCNv3.
        ),
    ]
    return Result(data, "\n".join(lines))


def _tensors(infos: Sequence[TensorInfo]) -> str:
    return ", ".join(f"{info.name} {info.describe()}" for info in infos)


def _check_target(arguments: argparse.Namespace) -> None:
    """Raise the compiler's errors early, before the model is built and imported."""
    from dcnv3_tvm.compiler.compile import check_buildable, check_dtype
    from dcnv3_tvm.compiler.linker import system_to_build
    from dcnv3_tvm.compiler.runtime_wheel import runtime_libraries
    from dcnv3_tvm.schedules.records import find_records
    from dcnv3_tvm.targets import is_gpu, resolve_target

    target = resolve_target(arguments.target)
    check_buildable(target)
    if arguments.runtime_wheel is not None:
        system = system_to_build(target)
        runtime_libraries(system, on_gpu=is_gpu(target), wheel=arguments.runtime_wheel)
    check_dtype(arguments.dtype, target)
    find_records(target, arguments.database)


def _import(
    name: str, checkpoint: Path | None, arguments: argparse.Namespace, progress: Progress
) -> list[ImportedModel]:
    """Import the model for each image size."""
    from dcnv3_tvm import frontend

    labels = read_labels(arguments.labels)
    model = create_described(name, checkpoint, arguments)
    progress.step("import into Relax")
    imported = [
        frontend.import_model(
            model,
            example=shape,
            dynamic_batch=arguments.dynamic_batch,
            dynamic_size=arguments.dynamic_size or False,
            labels=labels,
        )
        for shape in _shapes(name, arguments)
    ]
    weights = describe_weights(checkpoint, arguments)
    return [
        dataclasses.replace(each, config=each.config | {"weights": weights}) for each in imported
    ]


def _shapes(name: str, arguments: argparse.Namespace) -> list[tuple[int, int, int, int]]:
    from dcnv3_tvm.frontend.models.variants import model_config

    return image_shapes(arguments, arguments.size or [(model_config(name).resolution,) * 2])
