"""``dcnv3-tvm verify``: compare an artifact with PyTorch."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any, Final

from dcnv3_tvm.cli.arguments import parse_natural, parse_path
from dcnv3_tvm.cli.model_arguments import add_weights, create
from dcnv3_tvm.cli.result import Result, table
from dcnv3_tvm.cli.run import add_device, add_value_range
from dcnv3_tvm.errors import InvalidArgumentError
from dcnv3_tvm.progress import Progress
from dcnv3_tvm.signature import MAIN, size_name

if TYPE_CHECKING:
    import numpy as np

    from dcnv3_tvm.runtime import CompiledModel

HELP: Final = "compare an artifact with PyTorch in float64"
EXAMPLE: Final = "dcnv3-tvm verify artifact photo.jpg --checkpoint internimage_t_1k_224.pth"

_DYNAMIC_BATCH: Final = 2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("artifact", type=parse_path, help="artifact folder")
    parser.add_argument(
        "image", type=parse_path, nargs="*", help="image files to compare on as well"
    )
    add_weights(parser)
    add_device(parser)
    add_value_range(parser)
    parser.add_argument(
        "--record", action="store_true", help="write the result to the artifact's metadata"
    )
    parser.add_argument(
        "--seed", type=parse_natural, default=0, help="seed of the random input (default: 0)"
    )


def execute(arguments: argparse.Namespace) -> Result:
    """Compare the outputs on each input."""
    from dcnv3_tvm import runtime

    if arguments.checkpoint is None and arguments.random_weights is None:
        raise InvalidArgumentError(
            "the weights to compare with are missing",
            allowed="--checkpoint FILE or --random-weights SEED, as given to compile",
        )
    from dcnv3_tvm.verify.tolerances import model_tolerance

    compiled = runtime.load(arguments.artifact, device=arguments.device)
    inputs = _inputs(compiled, arguments)
    dtype = compiled.metadata.dtype
    measure, tolerance = model_tolerance(dtype)
    with Progress(f"verify {compiled.metadata.name}", quiet=arguments.quiet) as progress:
        progress.step("build PyTorch model")
        model = _model(compiled.metadata.config, arguments)
        from dcnv3_tvm.verify.compare import compare

        rows = []
        for name, image in inputs.items():
            progress.step(f"compare on {name}")
            rows += [
                {
                    "input": name,
                    "output": found.output,
                    "max_error": found.maximum,
                    "mean_error": found.mean,
                    "norm_error": found.norm,
                    "max_abs_reference": found.scale,
                    "ok": found.within(dtype),
                }
                for found in compare(compiled, model, image)
            ]
    ok = all(row["ok"] for row in rows)
    verdict = "agrees with" if ok else "DIFFERS from"
    text = table(
        ["input", "output", "max error", "mean error", "norm error", "max |reference|", ""],
        [
            (
                row["input"],
                row["output"],
                f"{row['max_error']:.2e}",
                f"{row['mean_error']:.2e}",
                f"{row['norm_error']:.2e}",
                f"{row['max_abs_reference']:.4g}",
                "ok" if row["ok"] else "TOO FAR",
            )
            for row in rows
        ],
    )
    text += (
        f"\n{compiled.metadata.name} {verdict} PyTorch in float64 (max and mean error relative to "
        f"max |reference|, norm error to its norm; tolerance of the {measure} error {tolerance:g})"
    )
    result = {"ok": ok, "tolerance": tolerance, "measure": measure, "outputs": rows}
    if arguments.record:
        from dcnv3_tvm.compiler.artifact import record_verification

        record_verification(
            arguments.artifact, compiled.metadata, result | {"reference": "PyTorch in float64"}
        )
    return Result(result, text, ok=ok)


def _inputs(compiled: CompiledModel, arguments: argparse.Namespace) -> dict[str, np.ndarray]:
    """Return random values, and the images, for each image size."""
    import numpy as np

    metadata = compiled.metadata
    generator = np.random.default_rng(arguments.seed)
    inputs: dict[str, np.ndarray] = {}
    sizes: list[tuple[int, int] | None] = [*metadata.image_sizes] or [None]
    for size in sizes:
        info = metadata.entry_for(MAIN, size).inputs[0]
        batch = info.shape[0] if isinstance(info.shape[0], int) else _DYNAMIC_BATCH
        shape: tuple[Any, ...] = (batch, *info.shape[1:])
        if size is None:
            shape = (batch, 3, *metadata.preprocessing["crop"])
        random = generator.standard_normal(shape).astype(info.dtype)
        inputs[f"random {info.name} {'x'.join(map(str, shape))} {info.dtype}"] = random
        suffix = f" at {size_name(size)}" if size and metadata.sizes else ""
        for path in arguments.image:
            pixels = compiled.preprocess(path, size=size, value_range=arguments.value_range)
            name = path if f"{path.name}{suffix}" in inputs else path.name
            inputs[f"{name}{suffix}"] = pixels.repeat(batch, axis=0)
    return inputs


def _model(config: dict[str, Any], arguments: argparse.Namespace) -> Any:
    from dcnv3_tvm.frontend.models.variants import VARIANTS

    if config.get("variant") not in VARIANTS:
        raise InvalidArgumentError(
            "the artifact is not of an InternImage variant, so it cannot be verified here",
            hint="Compare your own model with dcnv3_tvm.verify.compare.",
        )
    return create(
        config["variant"],
        arguments.checkpoint,
        arguments,
        num_classes=config["num_classes"],
        features_only=config["features_only"],
        out_indices=config["out_indices"],
        layer_scale=config["layer_scale"],
    )
