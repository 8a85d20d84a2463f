"""``dcnv3-tvm extensions``: stand in for the published CUDA extension in this environment."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
from typing import Final

from dcnv3_tvm.cli.result import Result

HELP: Final = "stand in for the published CUDA extension DCNv3"
EXAMPLE: Final = "dcnv3-tvm extensions install"

_ACTIONS: Final = {
    "install": "write the stand-in into this environment",
    "status": "show what `import DCNv3` gives",
    "remove": "delete the stand-in from this environment",
}
_TEXTS: Final = {
    "absent": "`import DCNv3` finds nothing; `dcnv3-tvm extensions install` adds it",
    "stand-in": "`import DCNv3` gives the operator of dcnv3-tvm",
    "extension": "`import DCNv3` gives an extension that is not part of dcnv3-tvm",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the actions."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    for name, text in _ACTIONS.items():
        action = actions.add_parser(
            name,
            example=f"dcnv3-tvm extensions {name}",
            help=text,
            description=f"{text[0].upper()}{text[1:]}.",
        )
        # Without SUPPRESS, the default here would overwrite --json of the command itself.
        action.add_argument(
            "--json", action="store_true", default=argparse.SUPPRESS, help="print JSON"
        )


def execute(arguments: argparse.Namespace) -> Result:
    """Run the action."""
    from dcnv3_tvm.pytorch import extensions

    action = {
        "install": extensions.install_in_environment,
        "status": extensions.status,
        "remove": extensions.remove_from_environment,
    }[arguments.action]
    found = action()
    has_pkg_resources = importlib.util.find_spec("pkg_resources") is not None
    lines = [_TEXTS[found.state]]
    if found.location is not None:
        lines.append(f"{found.location}, version {found.version or 'unknown'}")
    if not has_pkg_resources:
        lines.append(
            "pkg_resources, which the published code imports, is missing. "
            'Run: pip install "setuptools<82"'
        )
    data = {**dataclasses.asdict(found), "pkg_resources": has_pkg_resources}
    return Result(data, "\n".join(lines))
