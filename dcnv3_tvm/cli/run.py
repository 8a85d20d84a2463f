"""``dcnv3-tvm run``: run an artifact on an image."""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from dcnv3_tvm.cli.arguments import parse_count, parse_natural, parse_path
from dcnv3_tvm.cli.result import Result, table

if TYPE_CHECKING:
    import numpy as np

    from dcnv3_tvm.runtime import CompiledModel

HELP: Final = "run an artifact on an image"
EXAMPLE: Final = "dcnv3-tvm run artifact photo.jpg --top 3"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("artifact", type=parse_path, help="artifact folder")
    parser.add_argument("image", type=parse_path, help="image file of any size")
    parser.add_argument(
        "--top", type=parse_count, default=5, metavar="K", help="classes to print (default: 5)"
    )
    parser.add_argument(
        "--features",
        type=parse_path,
        metavar="FILE.npz",
        help="save feature maps instead of classes",
    )
    parser.add_argument(
        "--repeat",
        type=parse_natural,
        default=0,
        metavar="N",
        help="time N more calls; print quartiles",
    )
    parser.add_argument("--threads", type=parse_count, metavar="N", help="CPU threads")
    add_device(parser)


def add_device(parser: argparse.ArgumentParser) -> None:
    """Declare the device option."""
    parser.add_argument(
        "--device", help="cpu, cuda or cuda:1 (default: the device it was compiled for)"
    )


def execute(arguments: argparse.Namespace) -> Result:
    """Run the artifact on the image."""
    from dcnv3_tvm import runtime

    model = runtime.load(arguments.artifact, threads=arguments.threads, device=arguments.device)
    batch = _batch(model, arguments.image)
    data: dict[str, Any] = {
        "artifact": str(arguments.artifact),
        "image": str(arguments.image),
        "device": model.device,
    }
    lines = []
    call = model.features if arguments.features else model
    result: Any = call(batch)
    names = model.output_names((arguments.features and model.metadata.feature_entry) or "main")
    if arguments.features:
        maps = dict(zip(names, result, strict=True))
        path = _save(arguments.features, maps)
        data["features"] = {"file": str(path)} | _shapes(maps)
        lines += [f"{path}:", *(f"  {name} {shape}" for name, shape in _shapes(maps).items())]
    elif isinstance(result, dict) or result.ndim != 2:
        outputs = result if isinstance(result, dict) else {names[0]: result}
        data["outputs"] = _shapes(outputs)
        lines += [f"{name} {shape}" for name, shape in _shapes(outputs).items()]
    else:
        classes, probabilities = runtime.top_k(result[:1], k=min(arguments.top, result.shape[1]))
        data["top"] = [
            {"class": int(number), "probability": float(probability)}
            for number, probability in zip(classes[0], probabilities[0], strict=True)
        ]
        rows = [(row["class"], f"{row['probability']:.4f}") for row in data["top"]]
        lines.append(table(["class", "probability"], rows))
    if arguments.repeat > 0:
        times = _measure(call, batch, arguments.repeat)
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


def _batch(model: CompiledModel, image: Path) -> np.ndarray:
    """Preprocess the image, repeated to the batch size of a model with static batch."""
    batch = model.metadata.entries["main"].inputs[0].shape[0]
    return model.preprocess([image] * (batch if isinstance(batch, int) else 1))


def _save(path: Path, maps: dict[str, np.ndarray]) -> Path:
    import numpy as np

    from dcnv3_tvm import files
    from dcnv3_tvm.errors import InvalidArgumentError

    if path.suffix != ".npz":
        path = path.with_name(f"{path.name}.npz")
    first: dict[str, Any] = {name: values[:1] for name, values in maps.items()}
    try:
        with files.atomic_file(path) as temporary:
            np.savez(temporary, allow_pickle=False, **first)
    except OSError as error:
        raise InvalidArgumentError(
            "the feature maps cannot be saved", got=f"{error.strerror or error} ({path})"
        ) from error
    return path


def _shapes(maps: dict[str, np.ndarray]) -> dict[str, list[int]]:
    return {name: [1, *values.shape[1:]] for name, values in maps.items()}


def _measure(call: Any, batch: np.ndarray, repeat: int) -> dict[str, float]:
    times = []
    for _ in range(repeat):
        start = time.perf_counter()
        call(batch)
        times.append(1e3 * (time.perf_counter() - start))
    if repeat == 1:
        return dict.fromkeys(("median", "lower_quartile", "upper_quartile"), times[0])
    lower, median, upper = statistics.quantiles(times, n=4, method="inclusive")
    return {"median": median, "lower_quartile": lower, "upper_quartile": upper}
