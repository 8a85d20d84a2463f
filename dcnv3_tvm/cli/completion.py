"""``dcnv3-tvm completion``: print a script that completes command lines in a shell."""

from __future__ import annotations

import argparse
from typing import Final

from dcnv3_tvm.cli.arguments import parse_path
from dcnv3_tvm.cli.result import Result
from dcnv3_tvm.errors import MissingDependencyError

HELP: Final = "print a script that completes commands, options and files in your shell"
EXAMPLE: Final = "dcnv3-tvm completion zsh"

_MODEL: Final = {
    "bash": "_dcnv3_tvm_models_or_files",
    "zsh": "_dcnv3_tvm_models_or_files",
    "tcsh": "f",
}
"""How the argument ``model`` is completed, by shell: in bash, shtab takes ``_file`` for paths."""

_FUNCTIONS: Final = {
    "bash": """_dcnv3_tvm_models_or_files() {{
  compgen -W "{names}" -- "$1"
  compgen -f -- "$1"
}}
""",
    "zsh": """_dcnv3_tvm_models_or_files() {{
  _alternative "models:model:({names})" "files:file:_files"
}}
""",
}
"""Names of models, and files: checkpoints and artifacts."""


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
    from dcnv3_tvm.frontend import list_models

    whole = cli.parser(cli.load_verbs())
    _complete_arguments(whole, shtab.FILE)
    functions = _FUNCTIONS.get(arguments.shell, "").format(names=" ".join(list_models()))
    script = shtab.complete(whole, arguments.shell, preamble=functions)
    return Result({"shell": arguments.shell, "script": script}, script)


def _complete_arguments(parser: argparse.ArgumentParser, path: object) -> None:
    """Mark the arguments of a parser, and of its subcommands, that are paths or models."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                _complete_arguments(command, path)
        elif action.type is parse_path:
            action.complete = path  # type: ignore[attr-defined]
        elif action.dest == "model":
            action.complete = _MODEL  # type: ignore[attr-defined]
