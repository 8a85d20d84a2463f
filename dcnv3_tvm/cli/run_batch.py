"""Run an artifact on many images, and write a result for each."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol

from dcnv3_tvm import files
from dcnv3_tvm.cli.arguments import in_options
from dcnv3_tvm.cli.process import report, write
from dcnv3_tvm.cli.result import Result
from dcnv3_tvm.errors import ImageError, InvalidArgumentError, first_line, os_reason
from dcnv3_tvm.progress import Progress

if TYPE_CHECKING:
    import numpy as np

    from dcnv3_tvm.runtime import CompiledModel

SUFFIXES: Final = (
    *(".avif", ".bmp", ".gif", ".jp2", ".jpeg", ".jpg", ".jxl", ".pbm", ".pgm"),
    *(".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp"),
)
"""Endings of the names of the files that are taken from a folder."""

JSON_LINES: Final = ".jsonl"

_DYNAMIC_BATCH: Final = 8


@dataclasses.dataclass(frozen=True)
class _Image:
    """An image to run.

    Parameters
    ----------
    path : Path
        The file.
    name : str
        Its path relative to the folder that holds all images; unique.
    """

    path: Path
    name: str


class _Writer(Protocol):
    """Writes the results of images one by one."""

    def has(self, image: _Image) -> bool:
        """Whether an earlier run has written the result of an image."""

    def add(self, image: _Image, outputs: dict[str, np.ndarray]) -> None:
        """Write the outputs for an image, whose first axis is of size one."""


Describe = Callable[["dict[str, np.ndarray]"], "dict[str, Any]"]
"""Returns the JSON values that describe the outputs for an image."""


def run_batch(
    model: CompiledModel,
    arguments: argparse.Namespace,
    *,
    entry: str,
    output: Path | None,
    describe: Describe,
    line: Callable[[dict[str, Any]], str],
) -> Result:
    """Run a model on many images.

    Parameters
    ----------
    model : CompiledModel
        The model.
    arguments : argparse.Namespace
        The arguments of ``run``.
    entry : str
        Function of the model to call.
    output : Path or None
        A folder, which gets an .npz file for each image; a file of JSON lines; None for stdout.
    describe : callable
        Returns the JSON values that describe the outputs for an image.
    line : callable
        Returns such values as one line of text.
    """
    size = _batch_size(model, arguments.batch)
    images, failed = _find_images(arguments.image)
    with contextlib.ExitStack() as stack:
        writer = stack.enter_context(
            _open_writer(output, arguments, describe, json.dumps if arguments.json else line)
        )
        done = set(filter(writer.has, images)) if arguments.skip_existing else set()
        wanted = [image for image in images if image not in done]
        # On a terminal, the lines of the results show the progress.
        quiet = arguments.quiet or (output is None and sys.stdout.isatty())
        progress = stack.enter_context(Progress(f"run {model.metadata.name}", quiet=quiet))
        batch: list[tuple[_Image, np.ndarray]] = []
        for number, image in enumerate(wanted, 1):
            try:
                pixels = model.preprocess(
                    image.path, size=arguments.size, value_range=arguments.value_range
                )
                batch.append((image, pixels))
            except ImageError as error:
                failed.append(f"{image.path}: {error}")
                progress.note(f"dcnv3-tvm run: {in_options(failed[-1], arguments)}")
            if batch and (len(batch) == size or number == len(wanted)):
                _run(model, entry, batch, size, writer)
                batch.clear()
            progress.count(number, len(wanted))
        seconds = progress.seconds
    data = {
        "artifact": str(arguments.artifact),
        "device": model.device,
        "images": len(wanted),
        "skipped": len(done),
        "failed": failed,
        "output": None if output is None else str(output),
        "seconds": round(seconds, 3),
    }
    text = f"{len(wanted)} images, {len(failed)} failed, {len(done)} skipped, {seconds:.1f} s"
    if output is None:
        report(text)
        return Result(None, "", ok=not failed)
    return Result(data, f"{output}: {text}", ok=not failed)


def _find_images(inputs: Sequence[Path]) -> tuple[list[_Image], list[str]]:
    """Return the images, and folders that cannot be read."""
    unreadable: list[str] = []

    def note(error: OSError) -> None:
        unreadable.append(f"{error.filename}: {error.strerror}")
        report(f"dcnv3-tvm run: {unreadable[-1]}")

    paths: dict[str, Path] = {}
    roots = []
    for given in inputs:
        is_folder = given.is_dir()
        roots.append(os.path.abspath(given if is_folder else given.parent))
        found = _walk(given, note) if is_folder else [given]
        paths |= {os.path.abspath(path): path for path in found}
    if not paths and not unreadable:
        raise InvalidArgumentError(
            "the folders contain no images",
            got=", ".join(map(str, inputs)),
            allowed=f"files that end with {', '.join(SUFFIXES)}",
        )
    return [_Image(path, _relative(full, roots)) for full, path in paths.items()], unreadable


def _relative(path: str, roots: Sequence[str]) -> str:
    """Return an absolute path relative to the folder that holds all roots."""
    try:
        return os.path.relpath(path, os.path.commonpath(roots))
    except ValueError:  # On Windows, they are on several drives.
        return path.replace(":", "").lstrip("\\/")


def _walk(folder: Path, note: Callable[[OSError], None]) -> Iterator[Path]:
    # Links to folders, which may form a loop, are not followed.
    for parent, folders, names in os.walk(folder, onerror=note):
        folders.sort()
        for name in sorted(names):
            if os.path.splitext(name)[1].lower() in SUFFIXES:
                yield Path(parent, name)


def _batch_size(model: CompiledModel, wanted: int | None) -> int:
    compiled = _compiled_batch(model)
    if isinstance(compiled, str):
        return wanted or _DYNAMIC_BATCH
    if wanted not in (None, compiled):
        raise InvalidArgumentError(
            "the artifact has another batch size", got=f"--batch {wanted}", allowed=compiled
        )
    return compiled


def _compiled_batch(model: CompiledModel) -> int | str:
    return model.metadata.entries["main"].inputs[0].shape[0]


def _run(
    model: CompiledModel,
    entry: str,
    batch: Sequence[tuple[_Image, np.ndarray]],
    size: int,
    writer: _Writer,
) -> None:
    import numpy as np

    rows = [pixels for _, pixels in batch]
    if isinstance(_compiled_batch(model), int):
        rows += [rows[-1]] * (size - len(rows))  # The last batch may be incomplete.
    outputs = call(model, entry, np.concatenate(rows))
    for index, (image, _) in enumerate(batch):
        writer.add(image, {name: value[index : index + 1] for name, value in outputs.items()})


def call(model: CompiledModel, entry: str, batch: np.ndarray) -> dict[str, np.ndarray]:
    """Return the outputs of an entry by name."""
    result: Any = model(batch) if entry == "main" else model.features(batch)
    if isinstance(result, dict):
        return result
    values = result if isinstance(result, list) else [result]
    return dict(zip(model.output_names(entry), values, strict=True))


@contextlib.contextmanager
def _open_writer(
    output: Path | None,
    arguments: argparse.Namespace,
    describe: Describe,
    to_text: Callable[[dict[str, Any]], str],
) -> Iterator[_Writer]:
    if output is None:
        yield _Lines(describe, lambda data: write(to_text(data)))
        return
    if output.suffix in (".npz", ".json"):
        raise InvalidArgumentError(
            "many results do not go into one such file",
            got=output,
            allowed=f"a folder, or with --output a file *{JSON_LINES}",
        )
    try:
        if output.suffix != JSON_LINES or arguments.features:
            output.mkdir(parents=True, exist_ok=True)
            yield _Folder(output)
            return
        done = _resume(output) if arguments.skip_existing else {}
        with output.open("a" if arguments.skip_existing else "w", encoding="utf-8") as stream:
            yield _Lines(
                describe, lambda data: print(json.dumps(data), file=stream, flush=True), done
            )
    except OSError as error:
        raise InvalidArgumentError(
            "the results cannot be written",
            got=os_reason(error, output),
        ) from error


class _Lines:
    """Writes a line for each image."""

    def __init__(
        self,
        describe: Describe,
        emit: Callable[[dict[str, Any]], None],
        done: dict[str, Any] | None = None,
    ) -> None:
        self._describe = describe
        self._emit = emit
        self._done = done or {}

    def has(self, image: _Image) -> bool:
        return str(image.path) in self._done

    def add(self, image: _Image, outputs: dict[str, np.ndarray]) -> None:
        self._emit({"image": str(image.path)} | self._describe(outputs))


class _Folder:
    """Writes an .npz file for each image."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def has(self, image: _Image) -> bool:
        return self._path(image).exists()

    def add(self, image: _Image, outputs: dict[str, np.ndarray]) -> None:
        path = self._path(image)
        path.parent.mkdir(parents=True, exist_ok=True)
        save_arrays(path, outputs)

    def _path(self, image: _Image) -> Path:
        return self._folder / f"{image.name}.npz"


def save_arrays(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Write arrays to an .npz file, atomically."""
    import numpy as np

    named: dict[str, Any] = arrays
    with files.atomic_file(path) as temporary:
        np.savez(temporary, allow_pickle=False, **named)


def _resume(path: Path) -> dict[str, Any]:
    """Return the results in a file by image; remove an incomplete last line of a killed run."""
    if not path.exists():
        return {}
    content = path.read_bytes()
    complete = content.rfind(b"\n") + 1
    try:
        rows = [json.loads(line) for line in content[:complete].splitlines()]
        found = {row["image"]: row for row in rows}
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise InvalidArgumentError(
            "the file of results has a line that is not one",
            got=f"{path}: {first_line(error)}",
            hint="Choose another file, or leave --skip-existing out to replace it.",
        ) from error
    if complete < len(content):
        os.truncate(path, complete)
    return found
