"""Classify a folder of images on a Ray cluster, and write a row for each to Parquet or CSV.

    pip install 'dcnv3-tvm[ray]'
    python examples/ray_batch.py ARTIFACT IMAGES OUTPUT [--workers 2] [--size 384x640]

Each worker is a process that computes with one thread. Processes on one machine share the weights
in memory, because they map the same file. Without a cluster (RAY_ADDRESS), one is started on this
machine. On a cluster, artifact, images and output are on a file system that all machines mount.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Final

import numpy as np

import dcnv3_tvm as dt
from dcnv3_tvm.cli.arguments import add_chosen_size, parse_count, parse_path
from dcnv3_tvm.errors import ImageError
from dcnv3_tvm.runtime import top_k

SUFFIXES: Final = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")

BATCH: Final = 16
"""Rows of a call of the classifier: enough that Ray's share of the time is small."""

SHOWN_ERRORS: Final = 20


class Classifier:
    """A model in a worker process, called with batches of paths.

    Parameters
    ----------
    artifact : str
        Folder of a model with batch size 1 or dynamic batch.
    top : int
        Number of classes of an image.
    size : (int, int), optional
        Height and width that images get; by default the model's first.
    """

    def __init__(self, artifact: str, top: int = 5, size: tuple[int, int] | None = None) -> None:
        self._size = size
        self._model = dt.load(artifact, threads=1, warm_up=True)
        self._labels = np.array(self._model.metadata.labels)
        classes = self._model.metadata.entries["main"].outputs[0].shape[1]
        self._top = min(top, int(classes))

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Return columns: path, error, and class, label and probability of each rank.

        An image that cannot be read has an error, class -1 and probability NaN.
        """
        count = len(batch["path"])
        errors = [""] * count
        classes = np.full((count, self._top), -1)
        probabilities = np.full((count, self._top), np.nan)
        for row, path in enumerate(batch["path"]):
            # One by one: on a CPU, a batch of several computes no more images a second.
            try:
                logits = self._model(self._model.preprocess(str(path), size=self._size))
            except ImageError as error:
                errors[row] = str(error)
                continue
            classes[row], probabilities[row] = top_k(logits, k=self._top)
        columns = {"path": batch["path"], "error": np.array(errors, dtype=object)}
        for rank in range(self._top):
            columns[f"class_{rank + 1}"] = classes[:, rank]
            if len(self._labels):
                known = classes[:, rank] >= 0
                names = np.where(known, self._labels[classes[:, rank]], "")
                columns[f"label_{rank + 1}"] = names.astype(object)
            columns[f"probability_{rank + 1}"] = probabilities[:, rank]
        return columns


def find_images(folder: Path) -> list[str]:
    """Return the absolute paths of the images below a folder, sorted."""
    paths = (path for path in folder.resolve().rglob("*") if path.suffix.lower() in SUFFIXES)
    return sorted(map(str, paths))


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("artifact", type=parse_path, help="artifact folder")
    parser.add_argument("images", type=parse_path, help="folder of images, with its subfolders")
    parser.add_argument("output", type=parse_path, help="folder to write, which must not exist")
    parser.add_argument("--workers", type=parse_count, default=2, help="processes (default: 2)")
    parser.add_argument("--format", choices=["parquet", "csv"], default="parquet")
    parser.add_argument(
        "--top", type=parse_count, default=5, help="classes of an image (default: 5)"
    )
    add_chosen_size(parser)
    arguments = parser.parse_args()
    try:
        dt.runtime.read_metadata(arguments.artifact).preprocessing_for(arguments.size)
    except dt.DCNv3Error as error:
        parser.error(str(error))
    paths = find_images(arguments.images)
    if not paths:
        parser.error(f"{arguments.images}: no files that end with {', '.join(SUFFIXES)}")
    if arguments.output.exists():
        parser.error(f"{arguments.output} exists")

    import ray

    # The results are complete before they are written, because writing takes a free core, too.
    results = (
        ray.data.from_items([{"path": path} for path in paths])
        .map_batches(
            Classifier,
            fn_constructor_args=(
                str(arguments.artifact.resolve()),
                arguments.top,
                arguments.size,
            ),
            batch_size=BATCH,
            num_cpus=1,
            compute=ray.data.ActorPoolStrategy(size=arguments.workers),
        )
        .materialize()
    )
    write = results.write_csv if arguments.format == "csv" else results.write_parquet
    write(str(arguments.output.resolve()))
    failed = results.filter(lambda row: row["error"] != "")
    for row in failed.take(SHOWN_ERRORS):
        print(f"{row['path']}: {row['error']}", file=sys.stderr)
    count = failed.count()
    print(f"{arguments.output}: {len(paths)} images, {count} failed")
    return 1 if count else 0


if __name__ == "__main__":
    sys.exit(main())
