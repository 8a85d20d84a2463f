"""Parsing of arguments that subcommands share."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final, TypeVar

from dcnv3_tvm.errors import InvalidArgumentError, first_line
from dcnv3_tvm.preprocessing import parse_image_size

_Number = TypeVar("_Number", int, float)

_MAX_VALUES: Final = 2**31 - 1
"""Compiled code indexes with 32 bits."""

_KEYWORD: Final = re.compile(r"(with )?\b([a-z_]+)=(\"[^\"]*\"|'[^']*'|\([^)]*\)|[\w.+-]*\w)")
"""A keyword argument in an error's message, such as ``dtype="float32"``."""


class Parser(argparse.ArgumentParser):
    """A parser that takes options before, between and after positional arguments.

    Parameters
    ----------
    example : str
        A command line, with which the help ends.
    **options
        As of `argparse.ArgumentParser`.
    """

    def __init__(self, *, example: str = "", **options: Any) -> None:
        super().__init__(**options)
        self._example = example
        self._last: argparse.Action | None = None

    def format_help(self) -> str:
        """Return the help."""
        return f"{super().format_help()}\nExample: {self._example}\n"

    def add_argument(self, *names: Any, **options: Any) -> argparse.Action:
        """Declare an argument."""
        action = super().add_argument(*names, **options)
        if not action.option_strings and action.nargs in ("*", "+", "?"):
            self._last = action
        return action

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """Parse arguments; options may stand before and within a list, or an optional argument.

        argparse ends a list at the first option, and leaves the rest of it over.
        """
        parsed, rest = super().parse_known_args(args, namespace)
        if self._last is None or not rest or any(text.startswith("-") for text in rest):
            return parsed, rest
        given = getattr(parsed, self._last.dest)
        single = self._last.nargs == "?"
        if single and (given != self._last.default or len(rest) > 1):
            return parsed, rest
        convert: Any = self._last.type or str
        try:
            values = [convert(text) for text in rest]
        except (argparse.ArgumentTypeError, ValueError) as error:
            self.error(f"argument {self._last.dest}: {error}")
        setattr(parsed, self._last.dest, values[0] if single else [*given, *values])
        return parsed, []


def add_shape(parser: argparse.ArgumentParser, *, several: bool = False) -> None:
    """Declare batch size and image size of a model, or several image sizes."""
    parser.add_argument(
        "--batch", type=parse_count, default=1, metavar="N", help="batch size (default: 1)"
    )
    parser.add_argument(
        "--size",
        type=parse_size,
        action="append" if several else "store",
        metavar="HxW",
        help="image size (default: the model's own)"
        + ("; repeat it to accept images of several sizes" if several else ""),
    )


def add_chosen_size(parser: argparse.ArgumentParser) -> None:
    """Declare the size of the images for an artifact that accepts several."""
    parser.add_argument(
        "--size",
        type=parse_size,
        metavar="HxW",
        help="size of the images, where the artifact accepts several (default: the first)",
    )


def image_shape(arguments: argparse.Namespace, resolution: int) -> tuple[int, int, int, int]:
    """Return the shape of the input that `add_shape` describes.

    Parameters
    ----------
    arguments : argparse.Namespace
        The arguments.
    resolution : int
        Height and width by default.

    Raises
    ------
    InvalidArgumentError
        If the input has too many values.
    """
    (shape,) = image_shapes(arguments, [arguments.size or (resolution, resolution)])
    return shape


def image_shapes(
    arguments: argparse.Namespace, sizes: Sequence[tuple[int, int]]
) -> list[tuple[int, int, int, int]]:
    """Return the shapes of the input for several image sizes.

    Raises
    ------
    InvalidArgumentError
        If an input has too many values.
    """
    return [_image_shape(arguments.batch, *size) for size in dict.fromkeys(sizes)]


def _image_shape(batch: int, height: int, width: int) -> tuple[int, int, int, int]:
    shape = (batch, 3, height, width)
    if math.prod(shape) > _MAX_VALUES:
        raise InvalidArgumentError(
            "the image batch is too large",
            got=f"{' x '.join(map(str, shape))} values",
            allowed=f"{_MAX_VALUES:.1e}",
            hint="Use a smaller --batch or --size.",
        )
    return shape


def read_labels(path: Path | None) -> list[str] | None:
    """Read names of classes, one a line; None without a file."""
    if path is None:
        return None
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidArgumentError(
            "the labels cannot be read", got=f"{path}: {first_line(error)}"
        ) from error


def parse_path(text: str) -> Path:
    """Parse the path of a file or folder."""
    if not text:
        raise argparse.ArgumentTypeError("the path is empty")
    return Path(text)


def parse_count(text: str) -> int:
    """Parse an integer of at least one."""
    return _number(int, text, lambda number: 1 <= number < 2**31, "an integer of 1 or more")


def parse_natural(text: str) -> int:
    """Parse an integer of at least zero, such as a seed."""
    return _number(int, text, lambda number: 0 <= number < 2**63, "an integer of 0 or more")


def parse_port(text: str) -> int:
    """Parse the number of a TCP port."""
    return _number(int, text, lambda number: 1 <= number < 2**16, "a port from 1 to 65535")


def parse_positive(text: str) -> float:
    """Parse a finite number above zero."""
    return _number(float, text, lambda number: 0 < number < math.inf, "a number above 0")


def parse_size(text: str) -> tuple[int, int]:
    """Parse ``HxW``, or one number for both."""
    try:
        return parse_image_size(text)
    except InvalidArgumentError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def in_options(message: str, arguments: argparse.Namespace) -> str:
    """Replace the keyword arguments that an error mentions by the options of a command.

    Examples
    --------
    >>> in_options("Use num_classes=0.", argparse.Namespace(num_classes=None))
    'Use --num-classes 0.'
    """

    def option(match: re.Match[str]) -> str:
        before, name, value = match[1] or "", match[2], match[3].strip("\"'()")
        if name not in vars(arguments):
            return match[0]
        flag = f"--{name.replace('_', '-')}"
        if value == "False":
            return f"without {flag}"
        if value == "True":
            return before + flag
        return f"{before}{flag} {value.replace(', ', ',').replace('None', 'none')}"

    return _KEYWORD.sub(option, message)


def _number(
    kind: Callable[[str], _Number], text: str, is_allowed: Callable[[_Number], bool], allowed: str
) -> _Number:
    try:
        number = kind(text)
    except ValueError:
        number = None
    if number is None or not is_allowed(number):
        raise argparse.ArgumentTypeError(f"{text!r} is not {allowed}")
    return number
