"""``dcnv3-tvm tune``: measure schedules on a device, and keep the best."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from dcnv3_tvm.cli.compile import parse_size
from dcnv3_tvm.cli.result import Result, table
from dcnv3_tvm.errors import InvalidArgumentError
from dcnv3_tvm.progress import Progress

if TYPE_CHECKING:
    from dcnv3_tvm.imported_model import ImportedModel
    from dcnv3_tvm.spec import DCNv3Spec
    from dcnv3_tvm.tuning.tune import TuneConfig

HELP: Final = "find the fastest schedules of kernels on a device"

_OPERATOR: Final = "dcnv3-"
_SHOWN: Final = 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument(
        "what",
        nargs="+",
        help="names of `dcnv3-tvm models`, or operators such as "
        "dcnv3-n1-h56-w56-c64-g4-k3-s1-p1-d1-f32; what is named together is tuned together",
    )
    parser.add_argument(
        "--work-dir",
        type=Path,
        metavar="DIR",
        help="folder of the session: trials, records, pictures; a session in it is taken up again",
    )
    parser.add_argument(
        "--target",
        default="auto",
        help="as for compile; without --rpc this machine must run it (default: this processor)",
    )
    parser.add_argument("--dtype", default="float32", help="of models (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=1, metavar="N", help="images (default: 1)")
    parser.add_argument(
        "--size", type=parse_size, metavar="HxW", help="of images (default: the model's own)"
    )
    parser.add_argument(
        "--trials", type=int, metavar="N", help="schedules to try in all (default: 40 a kernel)"
    )
    parser.add_argument("--minutes", type=float, metavar="M", help="end after this time")
    parser.add_argument("--threads", type=int, metavar="N", help="of the processor that measures")
    parser.add_argument(
        "--device", type=int, default=0, metavar="INDEX", help="number of the GPU (default: 0)"
    )
    parser.add_argument(
        "--rpc", metavar="HOST:PORT", help="measure on servers of this RPC tracker (see `worker`)"
    )
    parser.add_argument("--rpc-key", metavar="KEY", help="under which the servers have registered")
    parser.add_argument(
        "--rpc-workers", type=int, default=1, metavar="N", help="number of servers (default: 1)"
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="time each kernel once, say what a session would do, and write nothing",
    )


def execute(arguments: argparse.Namespace) -> Result:
    """Tune."""
    if arguments.work_dir is None and not arguments.dry_run:
        raise InvalidArgumentError(
            "a session needs a folder",
            hint="Add --work-dir runs/t, or --dry-run to see what would be done.",
        )
    from dcnv3_tvm import targets
    from dcnv3_tvm.compiler.compile import check_dtype
    from dcnv3_tvm.tuning.display import Display
    from dcnv3_tvm.tuning.tune import estimate, tune

    config = _config(arguments)
    # Before models are imported, which takes a while.
    check_dtype(config.dtype, targets.resolve_target(config.target))
    what = _what(arguments)
    if arguments.dry_run:
        plan = estimate(what, config)
        return Result(plan, _plan_text(plan))
    summary = tune(what, arguments.work_dir, config, on_news=Display().show)
    return Result(summary, _summary_text(summary, arguments))


def parse_address(text: str, option: str) -> tuple[str, int]:
    """Read ``HOST:PORT``."""
    host, _, port = text.rpartition(":")
    if not host or not port.isdecimal():
        raise InvalidArgumentError(
            f"{option} is no address", got=repr(text), allowed="HOST:PORT, such as 10.0.0.1:9190"
        )
    return host, int(port)


def _config(arguments: argparse.Namespace) -> TuneConfig:
    from dcnv3_tvm.tuning.tune import Tracker, TuneConfig

    tracker = None
    if arguments.rpc is not None:
        if arguments.rpc_key is None or arguments.rpc_workers < 1:
            raise InvalidArgumentError(
                "servers are not named",
                got=f"--rpc-key {arguments.rpc_key} --rpc-workers {arguments.rpc_workers}",
                allowed="the key of `dcnv3-tvm worker --key KEY`, and how many there are",
            )
        host, port = parse_address(arguments.rpc, "--rpc")
        tracker = Tracker(host, port, arguments.rpc_key, arguments.rpc_workers)
    return TuneConfig(
        target=arguments.target,
        dtype=arguments.dtype,
        trials=arguments.trials,
        minutes=arguments.minutes,
        threads=arguments.threads,
        device=arguments.device,
        tracker=tracker,
    )


def _what(arguments: argparse.Namespace) -> list[ImportedModel | DCNv3Spec]:
    """Import the models and read the operators."""
    from dcnv3_tvm.frontend.models.variants import model_config
    from dcnv3_tvm.spec import DCNv3Spec

    if arguments.batch < 1:
        raise InvalidArgumentError(
            "--batch is out of range", got=arguments.batch, allowed="1 or more"
        )
    operators = [name for name in arguments.what if name.startswith(_OPERATOR)]
    models = [name for name in arguments.what if not name.startswith(_OPERATOR)]
    found: list[ImportedModel | DCNv3Spec] = [DCNv3Spec.from_slug(name) for name in operators]
    for name in models:
        model_config(name)  # An unknown name is refused before any model is imported.
    for name in models:
        with Progress(f"import {name}"):
            found.append(import_model(name, arguments.batch, arguments.size))
    return found


def import_model(name: str, batch: int, size: tuple[int, int] | None) -> ImportedModel:
    """Import a model for its kernels: its weights do not matter."""
    from dcnv3_tvm import frontend
    from dcnv3_tvm.frontend.models.variants import model_config

    resolution = model_config(name).resolution
    example = (batch, 3, *(size or (resolution, resolution)))
    return frontend.import_model(frontend.create_model(name), example=example)


def _plan_text(plan: dict[str, Any]) -> str:
    rows = [
        (
            f"{100 * kernel['share']:5.1f}%",
            kernel["calls"],
            f"{1e6 * kernel['seconds']:9.1f}" if kernel["seconds"] else "fails",
            kernel["space"],
            kernel["kernel"],
        )
        for kernel in plan["kernels"]
    ]
    return "\n".join(
        [
            table(["share", "calls", "us a call", "schedules", "kernel"], rows),
            "",
            f"{len(rows)} kernels for {plan['target']}: {plan['trials']} trials would take about "
            f"{plan['minutes']:.1f} minutes",
        ]
    )


def _summary_text(summary: dict[str, Any], arguments: argparse.Namespace) -> str:
    rows = [
        (
            f"{100 * kernel['share_before']:5.1f}%",
            f"{1e6 * kernel['default_seconds']:9.1f}",
            f"{1e6 * kernel['seconds']:9.1f}",
            f"{kernel['default_seconds'] / kernel['seconds']:6.2f}x",
            ", ".join(f"{name}={value}" for name, value in kernel["decisions"].items()),
            f"{kernel['calls']} x {kernel['kernel']}",
        )
        for kernel in summary["kernels"][:_SHOWN]
    ]
    more = len(summary["kernels"]) - len(rows)
    ended = "interrupted" if summary["interrupted"] else "done"
    lines = [
        table(["share", "default us", "tuned us", "faster", "decisions", "kernel"], rows),
        *([f"... and {more} more in {arguments.work_dir / 'summary.json'}"] if more else []),
        "",
        f"{ended}: {summary['trials']} trials, {summary['trials_per_minute']:.0f} a minute; all "
        f"kernels together {1e3 * summary['before']:.3f} -> {1e3 * summary['after']:.3f} ms",
    ]
    if summary["without_schedule"]:
        lines.append(f"no schedule works for: {', '.join(summary['without_schedule'])}")
    model = next((name for name in arguments.what if not name.startswith(_OPERATOR)), None)
    if model is not None:
        lines.append(
            f"next: dcnv3-tvm compile {model} --target {summary['target']} "
            f"--database {arguments.work_dir} --checkpoint FILE -o {model}"
        )
    return "\n".join(lines)
