"""The command line ``dcnv3-tvm``: data on stdout, messages on stderr.

Exit codes: 0 for success, 1 for failure, 2 for invalid usage or input, 130 for Ctrl-C.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.metadata
import json
import os
import sys
from collections.abc import Sequence
from typing import Final, Protocol, cast

from dcnv3_tvm import errors
from dcnv3_tvm.cli.result import Result

VERBS: Final = (
    "models",
    "compile",
    "run",
    "verify",
    "explain",
    "tune",
    "records",
    "worker",
    "bench",
    "info",
    "env",
)
_STDOUT: Final = "-"
_INPUT_ERRORS: Final = (
    errors.InvalidArgumentError,
    errors.CheckpointError,
    errors.TargetError,
    errors.ArtifactError,
    errors.ImageError,
)


class _Verb(Protocol):
    """A module of this package that implements a subcommand."""

    HELP: str

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Declare the arguments."""

    def execute(self, arguments: argparse.Namespace) -> Result:
        """Run the subcommand."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code.

    Parameters
    ----------
    argv : sequence of str, optional
        Arguments without the program's name; by default those of the process.
    """
    verbs = {name: _load(name) for name in VERBS}
    arguments = _parser(verbs).parse_args(argv)
    try:
        result = verbs[arguments.verb].execute(arguments)
        as_json = arguments.json in (True, _STDOUT)
        print(json.dumps(result.data, indent=2) if as_json else result.text)
        sys.stdout.flush()
    except errors.DCNv3Error as error:
        print(f"dcnv3-tvm {arguments.verb}: error: {error}", file=sys.stderr)
        return 2 if isinstance(error, _INPUT_ERRORS) else 1
    except KeyboardInterrupt:
        print(f"dcnv3-tvm {arguments.verb}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader, such as `head`, has closed the pipe. Flushing at exit would raise once more.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return 0 if result.ok else 1


def _load(name: str) -> _Verb:
    return cast(_Verb, importlib.import_module(f"dcnv3_tvm.cli.{name}"))


def _parser(verbs: dict[str, _Verb]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="dcnv3-tvm", description="Compile InternImage and DCNv3 with TVM."
    )
    version = importlib.metadata.version("dcnv3-tvm")
    parser.add_argument("--version", action="version", version=f"dcnv3-tvm {version}")
    commands = parser.add_subparsers(dest="verb", required=True, metavar="COMMAND")
    for name, verb in verbs.items():
        description = f"{verb.HELP[0].upper()}{verb.HELP[1:]}."
        command = commands.add_parser(name, help=verb.HELP, description=description)
        verb.add_arguments(command)
        # Some subcommands declare a --json of their own, which can also write to a file.
        with contextlib.suppress(argparse.ArgumentError):
            command.add_argument("--json", action="store_true", help="print JSON")
    return parser
