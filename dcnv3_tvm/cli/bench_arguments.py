"""Arguments of the sub-commands of ``dcnv3-tvm bench``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Final

from dcnv3_tvm.bench import cases
from dcnv3_tvm.bench.backends import PEERS
from dcnv3_tvm.bench.gpu_cases import PARTS, SECONDS
from dcnv3_tvm.cli.arguments import (
    parse_count,
    parse_natural,
    parse_path,
    parse_positive,
    parse_size,
)

STDOUT: Final = "-"
"""Value of ``--json`` that prints instead of writing a file."""

NONE: Final = "none"
"""Value of ``--against`` that selects no backend."""


def add_model(parser: argparse.ArgumentParser) -> None:
    """Declare variant, batch size and image size."""
    _add_model(parser, 1, "1")


def add_training_model(parser: argparse.ArgumentParser) -> None:
    """Declare variant, batch size and image size of a training step."""
    _add_model(parser, cases.TRAINING_BATCH, str(cases.TRAINING_BATCH))


def add_operator(parser: argparse.ArgumentParser) -> None:
    """Declare variant, batch size and image size, from which the operator's problems follow."""
    _add_model(parser, None, f"1; with --backward, {cases.TRAINING_BATCH}")


def _add_model(parser: argparse.ArgumentParser, batch: int | None, shown: str) -> None:
    parser.add_argument(
        "--variant",
        default="internimage_t",
        help="a model of `dcnv3-tvm models` (default: %(default)s)",
    )
    parser.add_argument(
        "--batch",
        type=parse_count,
        default=batch,
        metavar="N",
        help=f"batch size (default: {shown})",
    )
    parser.add_argument(
        "--size",
        type=parse_size,
        metavar="HxW",
        help="image size (default: the resolution of the variant)",
    )


def add_threads(parser: argparse.ArgumentParser) -> None:
    """Declare the number of threads."""
    parser.add_argument(
        "--threads", type=parse_count, metavar="N", help="threads that compute (default: all cores)"
    )


def add_json(parser: argparse.ArgumentParser) -> None:
    """Declare the destination of JSON."""
    parser.add_argument(
        "--json",
        nargs="?",
        const=STDOUT,
        # `dcnv3-tvm bench` also has --json; its value must not be overwritten by a default.
        default=argparse.SUPPRESS,
        metavar="FILE",
        help="write JSON to a file, or print it instead of the table",
    )


def add_case(parser: argparse.ArgumentParser) -> None:
    """Declare a filter on the cases."""
    parser.add_argument(
        "--case", default="*", metavar="PATTERN", help="only cases whose name matches the pattern"
    )


def add_backward(parser: argparse.ArgumentParser) -> None:
    """Declare that gradients are computed, too."""
    parser.add_argument(
        "--backward",
        action="store_true",
        help="in PyTorch, forward and backward, compared with PyTorch's autograd",
    )


def add_cpu_dtype(parser: argparse.ArgumentParser) -> None:
    """Declare the matmul dtype on a CPU."""
    _add_dtype(parser, cases.CPU_DTYPES)


def add_dtype(parser: argparse.ArgumentParser) -> None:
    """Declare the matmul dtype on a CPU or a GPU."""
    _add_dtype(parser, tuple(cases.DTYPES))


def add_training_dtype(parser: argparse.ArgumentParser) -> None:
    """Declare the dtype of training steps on a CPU."""
    _add_dtype(parser, cases.CPU_DTYPES, "dtype of the steps; other than float32, by autocast")


def _add_dtype(
    parser: argparse.ArgumentParser,
    choices: tuple[str, ...],
    meaning: str = "matmul dtype of this library",
) -> None:
    parser.add_argument(
        "--dtype", choices=choices, default="float32", help=f"{meaning} (default: %(default)s)"
    )


def add_features(parser: argparse.ArgumentParser) -> None:
    """Declare the feature pyramid."""
    parser.add_argument(
        "--features", action="store_true", help="the feature pyramid, without a head"
    )


def add_against(parser: argparse.ArgumentParser) -> None:
    """Declare the backends to compare with."""
    names = ",".join(peer.name for peer in PEERS)
    parser.add_argument(
        "--against",
        metavar="NAMES",
        help=f"backends to compare with, of {names}, or {NONE} (default: all that support the "
        "dtype, without untuned)",
    )


def add_rounds(parser: argparse.ArgumentParser) -> None:
    """Declare the number of rounds."""
    parser.add_argument(
        "--rounds", type=parse_count, default=5, metavar="N", help="bursts per backend (default: 5)"
    )


def add_plot(parser: argparse.ArgumentParser) -> None:
    """Declare the destination of a bar chart."""
    parser.add_argument(
        "--plot", type=parse_path, metavar="FILE", help="save a bar chart (.png, .svg, .pdf)"
    )


def add_device_model(parser: argparse.ArgumentParser) -> None:
    """Declare the GPU whose peak rates are known."""
    parser.add_argument(
        "--device-model", metavar="NAME", help="a GPU, h200, h100 or a100 (default: this CPU)"
    )


def add_gpu_cases(parser: argparse.ArgumentParser) -> None:
    """Declare a filter on the GPU cases."""
    parser.add_argument(
        "--part",
        choices=PARTS,
        help="only the operator, only its gradients, or only encoders (default: all)",
    )
    add_case(parser)


def add_gpu(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``gpu``."""
    parser.add_argument(
        "--results",
        type=parse_path,
        default=Path("bench-results"),
        metavar="DIR",
        help="folder for the JSON files (default: %(default)s)",
    )
    parser.add_argument(
        "--artifacts",
        type=parse_path,
        metavar="DIR",
        help="folder of results of `bench gpu-compile`; missing ones are compiled into it",
    )
    parser.add_argument(
        "--seconds",
        type=parse_positive,
        default=SECONDS,
        metavar="S",
        help="time budget; cases that do not fit are skipped and listed (default: %(default)g)",
    )
    parser.add_argument(
        "--device", type=parse_natural, default=0, metavar="N", help="index of the GPU (default: 0)"
    )


def add_gpu_compile(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``gpu-compile``."""
    parser.add_argument(
        "--artifacts", type=parse_path, required=True, metavar="DIR", help="folder to write to"
    )
    parser.add_argument("--target", required=True, help="GPU target, for example cuda-sm90")
