"""Run the model of this folder on images, and print the most probable classes.

An image is a file of any size, or an .npy file with the input itself, whose shape is its size.
"""

from __future__ import annotations

import argparse
import io
import json
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dcnv3_tvm import runtime
from dcnv3_tvm.errors import DCNv3Error
from dcnv3_tvm.preprocessing import parse_image_size

if TYPE_CHECKING:
    from dcnv3_tvm.runtime import CompiledModel


def main(argv: Sequence[str] | None = None) -> int:
    """Run the model on each image, and return the exit code: 1 if one of them failed.

    Parameters
    ----------
    argv : sequence of str, optional
        Arguments without the script's name; by default those of the process.
    """
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("image", nargs="+", type=Path, help="image file, or input as .npy")
    parser.add_argument("--top", type=int, default=5, metavar="K", help="classes (default: 5)")
    parser.add_argument(
        "--size",
        metavar="HxW",
        help="size that image files get, of those the model takes (default: the first)",
    )
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads")
    parser.add_argument("--json", action="store_true", help="print a JSON object for each image")
    arguments = parser.parse_args(argv)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # Not all of them can show all labels.
    try:
        size = None if arguments.size is None else parse_image_size(arguments.size)
        artifact = Path(__file__).resolve().with_name("artifact")
        model = runtime.load(artifact, threads=arguments.threads)
        model.metadata.preprocessing_for(size)  # Raises an error once, not for each image.
    except DCNv3Error as error:
        return _report(error)
    return max([_run(model, path, size, arguments) for path in arguments.image])


def _run(
    model: CompiledModel, path: Path, size: tuple[int, int] | None, arguments: argparse.Namespace
) -> int:
    try:
        for result in describe(model, path, top=arguments.top, size=size):
            print(json.dumps(result) if arguments.json else text(result), flush=True)
    except DCNv3Error as error:
        return _report(error)
    return 0


def _report(error: DCNv3Error) -> int:
    print(f"run.py: error: {error}", file=sys.stderr)
    return 1


def describe(
    model: CompiledModel, path: Path, *, top: int, size: tuple[int, int] | None = None
) -> list[dict[str, Any]]:
    """Return the most probable classes of each image of a file, or the shapes of other outputs.

    Parameters
    ----------
    model : CompiledModel
        The model.
    path : Path
        The image, or its input as ``.npy``.
    top : int
        Number of classes, at least 1.
    size : (int, int), optional
        Height and width that an image gets; by default the model's first.

    Raises
    ------
    DCNv3Error
        If the file cannot be read, or is not an input of the model.
    """
    image = read_array(path) if path.suffix == ".npy" else model.preprocess(path, size=size)
    outputs = model(image)
    if isinstance(outputs, dict) or outputs.ndim != 2:
        named = outputs if isinstance(outputs, dict) else {model.output_names()[0]: outputs}
        shapes = {name: list(values.shape) for name, values in named.items()}
        return [{"image": str(path), "outputs": shapes}]
    classes, probabilities = runtime.top_k(outputs, k=min(top, outputs.shape[1]))
    labels = model.metadata.labels
    return [
        {
            "image": str(path) if len(classes) == 1 else f"{path}[{index}]",
            "top": [
                {"class": int(number), "probability": float(probability)}
                | ({"label": labels[number]} if labels else {})
                for number, probability in zip(*row, strict=True)
            ],
        }
        for index, row in enumerate(zip(classes, probabilities, strict=True))
    ]


def read_array(path: Path) -> np.ndarray:
    """Return the array of an ``.npy`` file.

    Parameters
    ----------
    path : Path
        The file.

    Raises
    ------
    DCNv3Error
        If it cannot be read, or holds something else.
    """
    try:
        array: np.ndarray = np.load(path, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise DCNv3Error("the array cannot be read", got=f"{path} ({error})") from error
    return array


def text(result: dict[str, Any]) -> str:
    """Return a result of `describe` as lines of text."""
    if "top" not in result:
        lines = [f"{name} {shape}" for name, shape in result["outputs"].items()]
    else:
        lines = [
            f"{100 * row['probability']:6.2f} %  {row.get('label', row['class'])}"
            for row in result["top"]
        ]
    return "\n".join([result["image"], *lines])


if __name__ == "__main__":
    # The first process of a container ignores the signal otherwise, and `docker stop` waits.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    sys.exit(main())
