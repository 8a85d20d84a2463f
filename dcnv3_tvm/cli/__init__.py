"""The command line ``dcnv3-tvm``: data on stdout, messages on stderr.

Exit codes: 0 for success, 1 for failure, 2 for invalid usage or input, 130 for Ctrl-C, 143 for
SIGTERM.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.metadata
import json
import signal
import warnings
from collections.abc import Iterator, Sequence
from typing import Final, Protocol, TextIO, cast

from dcnv3_tvm import errors
from dcnv3_tvm.cli.arguments import Parser, in_options
from dcnv3_tvm.cli.process import StdoutClosedError, exit_code, prepared_process, report, write
from dcnv3_tvm.cli.result import Result

VERBS: Final = (
    "models",
    "compile",
    "export",
    "run",
    "verify",
    "explain",
    "visualize",
    "tune",
    "records",
    "worker",
    "bench",
    "profile",
    "extensions",
    "bundle",
    "info",
    "env",
    "completion",
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
    EXAMPLE: str

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
    with prepared_process() as received:
        try:
            return _run(argv, received)
        except KeyboardInterrupt:
            report("dcnv3-tvm: interrupted")
            return exit_code(signal.SIGINT)
        except StdoutClosedError:
            return 0
        except Exception as error:  # What PyTorch and TVM make of a signal.
            if not received:
                raise
            report(f"dcnv3-tvm: interrupted ({errors.first_line(error)})")
            return exit_code(received[-1])


def _run(argv: Sequence[str] | None, received: Sequence[int]) -> int:
    verbs = load_verbs()
    arguments = parser(verbs).parse_args(argv)
    program = f"dcnv3-tvm {arguments.verb}"
    try:
        with _warnings_as_messages(program):
            result = _execute(verbs[arguments.verb], arguments, program)
        if result.data is None:
            return 0 if result.ok else 1
        printed = arguments.json in (True, _STDOUT)
        try:
            write(json.dumps(result.data, indent=2) if printed else result.text)
        finally:  # Also if nobody reads what is printed.
            result.save()
    except errors.DCNv3Error as error:
        if received:
            raise
        report(f"{program}: error: {in_options(str(error), arguments)}")
        return 2 if isinstance(error, _INPUT_ERRORS) else 1
    except MemoryError:
        report(f"{program}: error: this machine has too little free memory")
        return 1
    return 0 if result.ok else 1


def _execute(verb: _Verb, arguments: argparse.Namespace, program: str) -> Result:
    try:
        return verb.execute(arguments)
    except ModuleNotFoundError as error:
        errors.raise_if_tvm_is_missing(error, program)
        if error.name == "torch":
            raise errors.MissingDependencyError(
                f"{program} needs PyTorch, which is not installed",
                hint='Run: pip install "dcnv3-tvm[torch]"',
            ) from error
        raise


@contextlib.contextmanager
def _warnings_as_messages(program: str) -> Iterator[None]:
    """Report this library's warnings like its errors, without a line of source code."""
    default = warnings.showwarning

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        if issubclass(category, errors.DCNv3Warning):
            report(f"{program}: warning: {message}")
        else:
            default(message, category, filename, lineno, file, line)

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield


def load_verbs() -> dict[str, _Verb]:
    """Return the modules of the subcommands."""
    return {name: cast(_Verb, importlib.import_module(f"dcnv3_tvm.cli.{name}")) for name in VERBS}


def parser(verbs: dict[str, _Verb]) -> Parser:
    """Return the parser of the whole command line."""
    result = Parser(
        prog="dcnv3-tvm",
        description="Compile InternImage and DCNv3 with TVM.",
        example="dcnv3-tvm compile internimage_t --checkpoint internimage_t_1k_224.pth -o artifact",
    )
    version = importlib.metadata.version("dcnv3-tvm")
    result.add_argument("--version", action="version", version=f"dcnv3-tvm {version}")
    commands = result.add_subparsers(dest="verb", required=True, metavar="COMMAND")
    for name, verb in verbs.items():
        description = f"{verb.HELP[0].upper()}{verb.HELP[1:]}."
        command = commands.add_parser(
            name, help=verb.HELP, description=description, example=verb.EXAMPLE
        )
        verb.add_arguments(command)
        # Some subcommands declare a --json of their own, which can also write to a file.
        with contextlib.suppress(argparse.ArgumentError):
            command.add_argument("--json", action="store_true", help="print JSON")
        _add_quiet(command, default=False)
    return result


def _add_quiet(command: argparse.ArgumentParser, *, default: bool | str) -> None:
    """Declare --quiet, also of the subcommands of a subcommand."""
    command.add_argument(
        "-q", "--quiet", action="store_true", default=default, help="show no progress"
    )
    for action in command._actions:
        if isinstance(action, argparse._SubParsersAction):
            for nested in action.choices.values():
                # A default here would overwrite the option of the command itself.
                _add_quiet(nested, default=argparse.SUPPRESS)
