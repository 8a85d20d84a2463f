"""``dcnv3-tvm visualize``: show where a model samples an image."""

from __future__ import annotations

import argparse
import functools
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from dcnv3_tvm import checks, files
from dcnv3_tvm.cli.arguments import parse_natural, parse_path, parse_size
from dcnv3_tvm.cli.model_arguments import add_model, create_described, find_model
from dcnv3_tvm.cli.result import Result, table
from dcnv3_tvm.cli.run import add_device, add_value_range
from dcnv3_tvm.errors import InvalidArgumentError
from dcnv3_tvm.preprocessing import size_settings
from dcnv3_tvm.progress import Progress

if TYPE_CHECKING:
    import numpy as np

    from dcnv3_tvm.visualize import BlockSampling

HELP: Final = "show where the DCNv3 of a model sample an image, as pictures or a page"
EXAMPLE: Final = "dcnv3-tvm visualize internimage_t_1k_224.pth photo.jpg -o page.html"

_PAGE: Final = (".html", ".htm")
_PICTURE: Final = (".png", ".svg")
_DEFAULT: Final = "points"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    add_model(parser, others=", or an artifact compiled with --expose offsets")
    parser.add_argument("image", type=parse_path, help="image file of any size")
    parser.add_argument(
        "-o",
        "--output",
        type=parse_path,
        required=True,
        metavar="PATH",
        help="page.html: a page on which the points follow the pointer; picture.png or .svg: one "
        "picture; otherwise a folder for the page and all pictures",
    )
    parser.add_argument(
        "--picture",
        metavar="KIND",
        help="picture to draw: points (default), field (receptive field), length (offset length), "
        "arrows (offset field), groups or histogram",
    )
    parser.add_argument(
        "--at", type=_parse_pixel, metavar="Y,X", help="pixel of the image (default: its middle)"
    )
    parser.add_argument(
        "--block",
        type=_parse_block,
        metavar="S.B",
        help="block to draw, such as 2.0 for the first of stage 2 (default: by kind of picture)",
    )
    parser.add_argument(
        "--group", type=parse_natural, metavar="N", help="group to draw (default: all)"
    )
    parser.add_argument(
        "--size", type=parse_size, metavar="HxW", help="image size (default: the model's own)"
    )
    add_device(parser)
    add_value_range(parser)


def execute(arguments: argparse.Namespace) -> Result:
    """Run the model, and write the page or the pictures."""
    from dcnv3_tvm import visualize

    output: Path = arguments.output
    suffix = output.suffix.lower()
    kind = _kind(arguments, suffix, visualize.PICTURES)
    with Progress(f"visualize {arguments.model}", quiet=arguments.quiet) as progress:
        name, blocks, photo = _sampled(arguments, progress)
        index = _index(blocks, arguments.block)
        _report_not_finite(blocks, progress)
        progress.step("draw")
        page = functools.partial(
            visualize.render_page, blocks, photo, title=f"{name} on {arguments.image.name}"
        )
        draw = functools.partial(
            visualize.draw_picture,
            blocks=blocks,
            photo=photo,
            at=arguments.at,
            index=index,
            group=arguments.group,
        )
        # Everything is drawn before anything is written.
        drawn: dict[Path, Any]
        if suffix in _PAGE:
            drawn = {output: page()}
        elif suffix in _PICTURE:
            drawn = {output: draw(kind)}
        else:
            drawn = {output / f"{each}.png": draw(each) for each in visualize.PICTURES}
            drawn[output / "page.html"] = page()
            _make_folder(output)
        for path, content in drawn.items():
            _write(path, content)
    written = list(drawn)
    rows = [_row(block) for block in blocks]
    lines = table(
        ["stage", "block", "positions", "groups", "mean offset", "longest"],
        [
            (
                row["stage"],
                row["block"],
                "{} x {}".format(*row["positions"]),
                row["groups"],
                *(
                    "" if row[length] is None else f"{row[length]:.2f}"
                    for length in ("mean_offset", "longest_offset")
                ),
            )
            for row in rows
        ],
    )
    text = f"{lines}\n(offsets in pixels of the image)\n{', '.join(map(str, written))}"
    return Result({"files": list(map(str, written)), "blocks": rows}, text)


def _kind(arguments: argparse.Namespace, suffix: str, kinds: tuple[str, ...]) -> str:
    """Return the picture to draw, after checking the options against the output."""
    chosen = arguments.picture
    if suffix and suffix not in (*_PAGE, *_PICTURE) and not arguments.output.is_dir():
        raise InvalidArgumentError(
            "the output has an unknown suffix",
            got=f"--output {arguments.output}",
            allowed=f"{', '.join((*_PAGE, *_PICTURE))}, a name without a suffix for a new folder, "
            "or an existing folder",
        )
    given = [name for name in ("at", "block", "group") if getattr(arguments, name) is not None]
    if suffix in _PAGE and given:
        raise InvalidArgumentError(
            "the page has choices of its own",
            got=f"--{given[0]}",
            allowed="--at, --block and --group for pictures: *.png, *.svg, or a folder",
        )
    if chosen is None:
        return _DEFAULT
    if suffix not in _PICTURE:
        raise InvalidArgumentError(
            "--picture needs a file for one picture",
            got=f"--output {arguments.output}",
            allowed="a file *.png or *.svg; a folder gets all pictures",
        )
    if chosen not in kinds:
        raise InvalidArgumentError(
            "there is no such picture", got=repr(chosen), allowed=", ".join(kinds)
        )
    return str(chosen)


def _sampled(
    arguments: argparse.Namespace, progress: Progress
) -> tuple[str, tuple[BlockSampling, ...], np.ndarray]:
    """Run the model; return its name, its blocks, and the image as it saw it."""
    from dcnv3_tvm import visualize
    from dcnv3_tvm.frontend.models.variants import VARIANTS
    from dcnv3_tvm.runtime.metadata import METADATA

    model: Any
    options = ("checkpoint", "random_weights", "num_classes")
    given = [name for name in options if getattr(arguments, name) is not None]
    # With weights, a name is that of a model also where a folder has it.
    named = given and arguments.model in VARIANTS
    if (Path(arguments.model) / METADATA).is_file() and not named:
        from dcnv3_tvm import runtime

        if given:
            raise InvalidArgumentError(
                "an artifact has its weights",
                got=f"--{given[0].replace('_', '-')}",
                hint="Leave this option out.",
            )
        checks.outside("the output", arguments.output, Path(arguments.model))
        model = runtime.load(arguments.model, device=arguments.device)
        name, settings = model.metadata.name, model.metadata.preprocessing
        image = model.preprocess(
            arguments.image, size=arguments.size, value_range=arguments.value_range
        )
    else:
        from dcnv3_tvm.frontend.models.variants import model_config
        from dcnv3_tvm.runtime.image import preprocess

        if arguments.device is not None:
            raise InvalidArgumentError(
                "--device is for artifacts",
                got=arguments.device,
                hint="Compile the model with --expose offsets, and visualize the artifact.",
            )
        name, checkpoint = find_model(arguments)
        progress.step("build PyTorch model")
        model = create_described(name, checkpoint, arguments)
        size = arguments.size or (model_config(name).resolution,) * 2
        settings = model.config.preprocessing | size_settings(size)
        image = preprocess(arguments.image, settings, value_range=arguments.value_range)
    progress.step("run")
    return name, visualize.capture_sampling(model, image), visualize.photo_of(image, settings)


def _index(blocks: tuple[BlockSampling, ...], wanted: tuple[int, int] | None) -> int | None:
    if wanted is None:
        return None
    for index, block in enumerate(blocks):
        if (block.stage, block.block) == wanted:
            return index
    last = {block.stage: block.block for block in blocks}
    raise InvalidArgumentError(
        "the model has no such block",
        got="{}.{}".format(*wanted),
        allowed=", ".join(f"{stage}.0 to {stage}.{block}" for stage, block in last.items()),
    )


def _row(block: BlockSampling) -> dict[str, Any]:
    import numpy as np

    lengths = block.offset_length
    lengths = lengths[np.isfinite(lengths)]
    return {
        "stage": block.stage,
        "block": block.block,
        "positions": list(block.output_size),
        "groups": block.params.group,
        "mean_offset": float(lengths.mean()) if lengths.size else None,
        "longest_offset": float(lengths.max()) if lengths.size else None,
    }


def _report_not_finite(blocks: tuple[BlockSampling, ...], progress: Progress) -> None:
    import numpy as np

    count = sum(int((~np.isfinite(block.offset_length)).sum()) for block in blocks)
    if count:
        progress.note(
            f"{count} sampling points are at no finite place (NaN or infinity). They are left out."
        )


def _write(path: Path, content: Any) -> None:
    """Write a page or a picture, or leave what is there."""
    if not isinstance(content, str):
        from dcnv3_tvm.visualize import save_picture

        save_picture(content, path)
        return
    with files.output_file("the page", path) as temporary:
        temporary.write_text(content, encoding="utf-8")


def _make_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InvalidArgumentError(
            "the folder cannot be made", got=f"{error.strerror or error} ({path})"
        ) from error


def _parse_pixel(text: str) -> tuple[float, float]:
    try:
        y, x = map(float, text.split(","))
    except ValueError:
        y = x = math.nan
    if not (math.isfinite(y) and math.isfinite(x)):
        raise argparse.ArgumentTypeError(f"{text!r} is not two numbers such as 112,80")
    return y, x


def _parse_block(text: str) -> tuple[int, int]:
    stage, dot, block = text.partition(".")
    if not (dot and stage.isdecimal() and block.isdecimal()):
        raise argparse.ArgumentTypeError(f"{text!r} is not stage.block such as 2.0")
    return int(stage), int(block)
