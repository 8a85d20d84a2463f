"""``dcnv3-tvm models``: list the models."""

from __future__ import annotations

import argparse
from typing import Any, Final

from dcnv3_tvm.cli.result import Result, table
from dcnv3_tvm.errors import InvalidArgumentError

HELP: Final = "list the models with their parameters and resolution"
EXAMPLE: Final = "dcnv3-tvm models"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument(
        "pattern", nargs="?", default="internimage_*", help="shell pattern (default: %(default)s)"
    )


def execute(arguments: argparse.Namespace) -> Result:
    """List the models whose name matches."""
    from dcnv3_tvm.frontend.models.parameter_count import parameter_count
    from dcnv3_tvm.frontend.models.variants import list_models, model_config

    names = list_models(arguments.pattern)
    if not names:
        raise InvalidArgumentError(
            "no model matches the pattern",
            got=repr(arguments.pattern),
            allowed=", ".join(list_models("internimage_*")),
        )
    rows: list[dict[str, Any]] = []
    for name in names:
        config = model_config(name)
        rows.append(
            {
                "name": name,
                "parameters": parameter_count(config),
                "resolution": config.resolution,
                "channels": list(config.feature_channels),
                "depths": list(config.depths),
            }
        )
    text = table(
        ["name", "parameters", "resolution", "channels", "depths"],
        [
            (
                row["name"],
                f"{row['parameters'] / 1e6:9.3f}M",
                row["resolution"],
                ", ".join(map(str, row["channels"])),
                ", ".join(map(str, row["depths"])),
            )
            for row in rows
        ],
    )
    return Result(rows, text)
