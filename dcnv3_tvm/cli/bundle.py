"""``dcnv3-tvm bundle``: write a folder that runs an artifact where there is only Python."""

from __future__ import annotations

import argparse
from typing import Final

from dcnv3_tvm.cli.arguments import parse_path
from dcnv3_tvm.cli.result import Result, table

HELP: Final = "write a folder that runs an artifact where there is only Python, or in a container"
EXAMPLE: Final = "dcnv3-tvm bundle artifact -o bundle"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("artifact", type=parse_path, help="artifact folder")
    parser.add_argument(
        "-o",
        "--output",
        type=parse_path,
        required=True,
        metavar="DIR",
        help="folder to write; a bundle in it is replaced",
    )


def execute(arguments: argparse.Namespace) -> Result:
    """Write the bundle."""
    from dcnv3_tvm.bundle.write import write

    sizes = write(arguments.artifact, arguments.output)
    rows = [[name, round(size / 1e6, 1)] for name, size in sizes.items()]
    lines = [
        table([f"in {arguments.output}", "MB"], rows),
        f"Run it with: python {arguments.output / 'run.py'} photo.jpg",
    ]
    return Result({"folder": str(arguments.output), "bytes": sizes}, "\n".join(lines))
