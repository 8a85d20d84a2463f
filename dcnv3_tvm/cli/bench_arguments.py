"""What the kinds of ``dcnv3-tvm bench`` take on the command line."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Final

from dcnv3_tvm.bench import cases
from dcnv3_tvm.bench.contestants import PEERS
from dcnv3_tvm.bench.gpu_cases import PARTS, SECONDS
from dcnv3_tvm.cli.compile import parse_size

STDOUT: Final = "-"
"""The value of ``--json`` that prints instead of writing a file."""

NONE: Final = "none"
"""The value of ``--against`` for nobody."""


def add_model(parser: argparse.ArgumentParser) -> None:
    """Declare the encoder, its batch and its size."""
    parser.add_argument(
        "--variant",
        default="internimage_t",
        help="a name of `dcnv3-tvm models` (default: %(default)s)",
    )
    parser.add_argument("--batch", type=int, default=1, metavar="N", help="images (default: 1)")
    parser.add_argument(
        "--size", type=parse_size, metavar="HxW", help="of the image (default: the variant's own)"
    )


def add_common(parser: argparse.ArgumentParser) -> None:
    """Declare an encoder on a CPU: also threads, and CSV."""
    add_model(parser)
    parser.add_argument(
        "--threads", type=int, metavar="N", help="that compute (default: the cores)"
    )
    add_csv(parser)


def add_json(parser: argparse.ArgumentParser) -> None:
    """Declare where JSON goes."""
    parser.add_argument(
        "--json",
        nargs="?",
        const=STDOUT,
        # The command has an option of this name, too, whose value must stand.
        default=argparse.SUPPRESS,
        metavar="FILE",
        help="write JSON to a file, or print it instead of the table",
    )


def add_csv(parser: argparse.ArgumentParser) -> None:
    """Declare where CSV goes."""
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write CSV")


def add_case(parser: argparse.ArgumentParser) -> None:
    """Declare a choice among the cases."""
    parser.add_argument(
        "--case", default="*", metavar="PATTERN", help="only cases whose name matches"
    )


def add_dtype(parser: argparse.ArgumentParser) -> None:
    """Declare the type of products on a CPU."""
    parser.add_argument(
        "--dtype",
        choices=cases.CPU_DTYPES,
        default="float32",
        help="of this library's products (default: %(default)s)",
    )


def _add_gpu_dtype(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--dtype",
        choices=tuple(cases.DTYPES),
        default="float16",
        help="of the products (default: %(default)s)",
    )


def add_features(parser: argparse.ArgumentParser) -> None:
    """Declare without a head."""
    parser.add_argument(
        "--features", action="store_true", help="the feature pyramid, without a head"
    )


def add_against(parser: argparse.ArgumentParser) -> None:
    """Declare the peers."""
    names = ",".join(peer.name for peer in PEERS)
    parser.add_argument(
        "--against",
        metavar="NAMES",
        help=f"of {names}, or {NONE} (default: all that take part in the dtype)",
    )


def add_rounds(parser: argparse.ArgumentParser) -> None:
    """Declare how often is measured."""
    parser.add_argument(
        "--rounds", type=int, default=5, metavar="N", help="bursts of each (default: 5)"
    )


def add_plot(parser: argparse.ArgumentParser) -> None:
    """Declare where a picture goes."""
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw bars (.png, .svg, .pdf)")


def add_device_model(parser: argparse.ArgumentParser) -> None:
    """Declare the model of a GPU, and the type of products there."""
    _add_gpu_dtype(parser)
    parser.add_argument(
        "--device-model",
        default="h200",
        metavar="NAME",
        help="the GPU: h200, h100 or a100 (default: %(default)s)",
    )


def add_gpu_cases(parser: argparse.ArgumentParser) -> None:
    """Declare a choice among what is measured on a GPU."""
    parser.add_argument(
        "--part", choices=PARTS, help="only the operator, or only encoders (default: both)"
    )
    add_case(parser)


def add_gpu(parser: argparse.ArgumentParser) -> None:
    """Declare a run on a GPU."""
    parser.add_argument(
        "--results",
        type=Path,
        default=Path("bench-results"),
        metavar="DIR",
        help="folder for the files (default: %(default)s)",
    )
    parser.add_argument(
        "--artifacts",
        type=Path,
        metavar="DIR",
        help="folder of what `bench gpu-compile` has compiled; the rest is compiled there",
    )
    parser.add_argument(
        "--seconds",
        type=float,
        default=SECONDS,
        metavar="S",
        help="for all of it; what does not fit is left out and said to be (default: %(default)g)",
    )
    parser.add_argument(
        "--device", type=int, default=0, metavar="N", help="number of the GPU (default: 0)"
    )


def add_gpu_compile(parser: argparse.ArgumentParser) -> None:
    """Declare what is compiled ahead for a GPU."""
    parser.add_argument(
        "--artifacts", type=Path, required=True, metavar="DIR", help="folder to write to"
    )
    parser.add_argument("--target", required=True, help="for example cuda-sm90")
