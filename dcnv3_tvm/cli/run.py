"""``dcnv3-tvm run``: run an artifact on images."""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from dcnv3_tvm import checks
from dcnv3_tvm.cli.arguments import add_chosen_size, parse_count, parse_natural, parse_path
from dcnv3_tvm.cli.result import Result, table
from dcnv3_tvm.cli.run_batch import JSON_LINES, call, run_batch, save_arrays
from dcnv3_tvm.errors import InvalidArgumentError

if TYPE_CHECKING:
    import numpy as np

    from dcnv3_tvm.runtime import CompiledModel

HELP: Final = "run an artifact on an image, or on many images and folders"
EXAMPLE: Final = "dcnv3-tvm run artifact photos --output results.jsonl --skip-existing"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("artifact", type=parse_path, help="artifact folder")
    parser.add_argument(
        "image", type=parse_path, nargs="+", help="image files of any size, and folders of images"
    )
    parser.add_argument(
        "--top", type=parse_count, default=5, metavar="K", help="classes to print (default: 5)"
    )
    outputs = parser.add_mutually_exclusive_group()
    outputs.add_argument(
        "-o",
        "--output",
        type=parse_path,
        metavar="PATH",
        help=f"write a line for each image to a file *{JSON_LINES}, or the model's outputs to a "
        "folder, an .npz file for each image",
    )
    outputs.add_argument(
        "--features",
        type=parse_path,
        metavar="PATH",
        help="save feature maps instead: an .npz file, or for many images a folder of them",
    )
    parser.add_argument(
        "--skip-existing",
        action="store_true",
        help="leave out images whose results an earlier run has written",
    )
    parser.add_argument(
        "--batch",
        type=parse_count,
        metavar="N",
        help="images in a call of an artifact with dynamic batch size (default: 8)",
    )
    parser.add_argument(
        "--repeat",
        type=parse_natural,
        default=0,
        metavar="N",
        help="time N more calls on one image; print quartiles",
    )
    add_chosen_size(parser)
    parser.add_argument("--threads", type=parse_count, metavar="N", help="CPU threads")
    add_device(parser)
    add_value_range(parser)


def add_device(parser: argparse.ArgumentParser) -> None:
    """Declare the device option."""
    parser.add_argument(
        "--device", help="cpu, cuda or cuda:1 (default: the device it was compiled for)"
    )


def add_value_range(parser: argparse.ArgumentParser) -> None:
    """Declare the range of images of more than 8 bits."""
    parser.add_argument(
        "--value-range",
        type=_parse_range,
        metavar="LOW,HIGH",
        help="values of black and white in images of floats or 32-bit integers",
    )


def execute(arguments: argparse.Namespace) -> Result:
    """Run the artifact on the images."""
    from dcnv3_tvm import runtime

    images = arguments.image
    many = len(images) > 1 or images[0].is_dir() or arguments.output is not None
    _check(arguments, many)
    for output in filter(None, (arguments.output, arguments.features)):
        checks.outside("the output", output, arguments.artifact)
    model = runtime.load(arguments.artifact, threads=arguments.threads, device=arguments.device)
    entry = model.metadata.feature_entry if arguments.features else "main"
    if entry is None:
        raise InvalidArgumentError(
            "the artifact has no feature maps",
            got=", ".join(model.output_names()),
            hint="Leave --features out, or compile the model with --features-only.",
        )
    model.metadata.preprocessing_for(arguments.size)  # Raises before results are replaced.
    if not many:
        return _run_one(model, entry, arguments)
    return run_batch(
        model,
        arguments,
        entry=entry,
        output=arguments.features or arguments.output,
        describe=lambda outputs: _describe(outputs, arguments.top, model.metadata.labels),
        line=_line,
    )


def _check(arguments: argparse.Namespace, many: bool) -> None:
    if many and arguments.repeat:
        raise InvalidArgumentError("--repeat takes one image, and no --output")
    if arguments.skip_existing and not (many and (arguments.output or arguments.features)):
        raise InvalidArgumentError(
            "--skip-existing needs results to look at", allowed="with --output, or many images"
        )


def _run_one(model: CompiledModel, entry: str, arguments: argparse.Namespace) -> Result:
    image = arguments.image[0]
    batch = _batch(model, image, arguments)
    data: dict[str, Any] = {
        "artifact": str(arguments.artifact),
        "image": str(image),
        "device": model.device,
    }
    lines = []
    outputs = {name: value[:1] for name, value in call(model, entry, batch).items()}
    if arguments.features:
        path = _save(arguments.features, outputs)
        data["features"] = {"file": str(path)} | _shapes(outputs)
        lines += [f"{path}:", *(f"  {name} {shape}" for name, shape in _shapes(outputs).items())]
    else:
        data |= _describe(outputs, arguments.top, model.metadata.labels)
        lines.append(_text(data))
    if arguments.repeat > 0:
        times = _measure(lambda: call(model, entry, batch), arguments.repeat)
        data["milliseconds"] = times | {"calls": arguments.repeat, "threads": model.threads}
        where = f"{model.threads} threads"
        if model.device != "cpu":
            where = f"on {model.device}, with copies between host and device"
        lines.append(
            f"{times['median']:.2f} ms median, quartiles {times['lower_quartile']:.2f} to "
            f"{times['upper_quartile']:.2f} ms ({arguments.repeat} calls, {where}, "
            f"batch {batch.shape[0]})"
        )
    return Result(data, "\n".join(lines))


def _describe(outputs: dict[str, np.ndarray], top: int, labels: Sequence[str]) -> dict[str, Any]:
    """Return the most probable classes of logits, or the shapes of other outputs."""
    from dcnv3_tvm import runtime

    logits = next(iter(outputs.values()))
    if len(outputs) > 1 or logits.ndim != 2:
        return {"outputs": _shapes(outputs)}
    classes, probabilities = runtime.top_k(logits, k=min(top, logits.shape[1]))
    return {
        "top": [
            {"class": int(number), "probability": float(probability)}
            | ({"label": labels[number]} if labels else {})
            for number, probability in zip(classes[0], probabilities[0], strict=True)
        ]
    }


def _text(data: dict[str, Any]) -> str:
    if "top" not in data:
        return "\n".join(f"{name} {shape}" for name, shape in data["outputs"].items())
    names = list(data["top"][0])
    rows = [
        [f"{v:.4f}" if isinstance(v, float) else v for v in row.values()] for row in data["top"]
    ]
    return table(names, rows)


def _line(data: dict[str, Any]) -> str:
    """Return the result for one of many images as a line."""
    if "top" not in data:
        return f"{data['image']}  " + ", ".join(f"{k} {v}" for k, v in data["outputs"].items())
    return f"{data['image']}  " + "  ".join(
        f"{row.get('label', row['class'])} {row['probability']:.4f}" for row in data["top"]
    )


def _batch(model: CompiledModel, image: Path, arguments: argparse.Namespace) -> np.ndarray:
    """Preprocess the image, repeated to the batch size of a model with static batch."""
    batch = model.metadata.entries["main"].inputs[0].shape[0]
    pixels = model.preprocess(image, size=arguments.size, value_range=arguments.value_range)
    return pixels.repeat(batch, axis=0) if isinstance(batch, int) and batch > 1 else pixels


def _save(path: Path, maps: dict[str, np.ndarray]) -> Path:
    if path.suffix != ".npz":
        path = path.with_name(f"{path.name}.npz")
    try:
        save_arrays(path, maps)
    except OSError as error:
        raise InvalidArgumentError(
            "the feature maps cannot be saved", got=f"{error.strerror or error} ({path})"
        ) from error
    return path


def _shapes(maps: dict[str, np.ndarray]) -> dict[str, list[int]]:
    return {name: list(values.shape) for name, values in maps.items()}


def _measure(run: Callable[[], object], repeat: int) -> dict[str, float]:
    times = []
    for _ in range(repeat):
        start = time.perf_counter()
        run()
        times.append(1e3 * (time.perf_counter() - start))
    if repeat == 1:
        return dict.fromkeys(("median", "lower_quartile", "upper_quartile"), times[0])
    lower, median, upper = statistics.quantiles(times, n=4, method="inclusive")
    return {"median": median, "lower_quartile": lower, "upper_quartile": upper}


def _parse_range(text: str) -> tuple[float, float]:
    try:
        low, high = map(float, text.split(","))
    except ValueError:
        low = high = math.nan
    if not (math.isfinite(low) and math.isfinite(high) and low != high):
        raise argparse.ArgumentTypeError(f"{text!r} is not two numbers such as 0,1")
    return low, high
