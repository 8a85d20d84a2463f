"""``dcnv3-tvm completion``: print a script that completes command lines in a shell."""

from __future__ import annotations

import argparse
from typing import Final

from dcnv3_tvm.cli.arguments import parse_path
from dcnv3_tvm.cli.result import Result
from dcnv3_tvm.errors import MissingDependencyError

HELP: Final = "print a script that completes commands, options and files in your shell"
EXAMPLE: Final = "dcnv3-tvm completion zsh"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("shell", choices=("bash", "zsh", "tcsh"), help="shell to complete in")


def execute(arguments: argparse.Namespace) -> Result:
    """Write the script for the whole command line."""
    try:
        import shtab
    except ImportError as error:
        raise MissingDependencyError(
            "shtab, which writes the script, is not installed", hint="Run: pip install shtab"
        ) from error
    from dcnv3_tvm import cli

    whole = cli.parser(cli.load_verbs())
    _complete_files(whole, shtab.FILE)
    script = shtab.complete(whole, arguments.shell)
    return Result({"shell": arguments.shell, "script": script}, script)


def _complete_files(parser: argparse.ArgumentParser, how: object) -> None:
    """Mark the arguments of a parser, and of its subcommands, that are paths."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                _complete_files(command, how)
        elif action.type is parse_path:
            action.complete = how  # type: ignore[attr-defined]
