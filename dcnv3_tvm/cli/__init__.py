"""The command line ``dcnv3-tvm``: data on stdout, words on stderr.

Exit codes: 0 for success, 1 for a failure, 2 for bad usage or bad input, 130 for Ctrl-C.
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

_VERBS: Final = (
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
_BAD_INPUT: Final = (
    errors.InvalidArgumentError,
    errors.CheckpointError,
    errors.TargetError,
    errors.ArtifactError,
    errors.ImageError,
)


class _Verb(Protocol):
    """A module of this package: one sub-command."""

    HELP: str

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Declare what the verb takes."""

    def execute(self, arguments: argparse.Namespace) -> Result:
        """Do it."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code.

    Parameters
    ----------
    argv : sequence of str, optional
        Arguments without the program's name; those of the process by default.
    """
    verbs = {name: _load(name) for name in _VERBS}
    arguments = _parser(verbs).parse_args(argv)
    try:
        result = verbs[arguments.verb].execute(arguments)
        as_json = arguments.json in (True, _STDOUT)
        print(json.dumps(result.data, indent=2) if as_json else result.text)
        sys.stdout.flush()
    except errors.DCNv3Error as error:
        print(f"dcnv3-tvm {arguments.verb}: error: {error}", file=sys.stderr)
        return 2 if isinstance(error, _BAD_INPUT) else 1
    except KeyboardInterrupt:
        print(f"dcnv3-tvm {arguments.verb}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader, such as `head`, has seen enough; without this the exit would complain again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return 0 if result.ok else 1


def _load(name: str) -> _Verb:
    return cast(_Verb, importlib.import_module(f"dcnv3_tvm.cli.{name}"))


def _parser(verbs: dict[str, _Verb]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="dcnv3-tvm", description="InternImage and DCNv3, compiled with TVM."
    )
    version = importlib.metadata.version("dcnv3-tvm")
    parser.add_argument("--version", action="version", version=f"dcnv3-tvm {version}")
    commands = parser.add_subparsers(dest="verb", required=True, metavar="COMMAND")
    for name, verb in verbs.items():
        command = commands.add_parser(name, help=verb.HELP, description=verb.HELP)
        verb.add_arguments(command)
        # A verb that can write JSON to a file, too, has declared an option of its own.
        with contextlib.suppress(argparse.ArgumentError):
            command.add_argument("--json", action="store_true", help="print JSON")
    return parser
