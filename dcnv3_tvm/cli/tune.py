"""``dcnv3-tvm tune``: find the fastest schedules of kernels on a device."""

from __future__ import annotations

import argparse
import re
import shlex
from typing import TYPE_CHECKING, Any, Final

from dcnv3_tvm.cli.arguments import (
    add_shape,
    image_shape,
    parse_count,
    parse_natural,
    parse_path,
    parse_positive,
)
from dcnv3_tvm.cli.result import Result, table
from dcnv3_tvm.errors import InvalidArgumentError
from dcnv3_tvm.progress import Progress
from dcnv3_tvm.signature import size_name

if TYPE_CHECKING:
    from dcnv3_tvm.imported_model import ImportedModel
    from dcnv3_tvm.spec import DCNv3Spec
    from dcnv3_tvm.tuning.rpc import RpcConfig
    from dcnv3_tvm.tuning.tune import TuneConfig

HELP: Final = "find the fastest schedules of kernels on a device"
EXAMPLE: Final = "dcnv3-tvm tune internimage_t --work-dir runs/t --minutes 30"

_OPERATOR_PREFIX: Final = "dcnv3-"
_MAX_ROWS: Final = 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument(
        "models",
        nargs="+",
        metavar="MODEL",
        help="name listed by `dcnv3-tvm models`, or slug of an operator such as "
        "dcnv3-n1-h56-w56-c64-g4-k3-s1-p1-d1-f32; several are tuned together",
    )
    parser.add_argument(
        "--work-dir",
        type=parse_path,
        metavar="DIR",
        help="folder for trials, records and plots; a session found there is continued",
    )
    parser.add_argument(
        "--target",
        default="auto",
        help="as for compile; this machine must run it unless --rpc is given (default: this CPU)",
    )
    parser.add_argument(
        "--dtype", default="float32", help="element type of models (default: %(default)s)"
    )
    add_shape(parser)
    parser.add_argument(
        "--backward", action="store_true", help="tune the gradient kernels of operators, too"
    )
    parser.add_argument(
        "--trials",
        type=parse_count,
        metavar="N",
        help="total number of trials (default: 40 per kernel)",
    )
    parser.add_argument("--minutes", type=parse_positive, metavar="M", help="time limit")
    parser.add_argument(
        "--timeout",
        type=parse_positive,
        default=20.0,
        metavar="S",
        help="seconds after which a measurement is killed (default: 20)",
    )
    parser.add_argument(
        "--threads",
        type=parse_count,
        metavar="N",
        help="CPU threads of a kernel (default: as compiled)",
    )
    parser.add_argument(
        "--device",
        type=parse_natural,
        default=0,
        metavar="INDEX",
        help="index of the GPU (default: 0)",
    )
    parser.add_argument(
        "--rpc",
        metavar="HOST:PORT",
        help="measure on servers of this RPC tracker (see `dcnv3-tvm worker`)",
    )
    parser.add_argument("--rpc-key", metavar="KEY", help="key that the servers registered under")
    parser.add_argument(
        "--rpc-workers",
        type=parse_count,
        default=1,
        metavar="N",
        help="number of servers (default: 1)",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="time each default schedule once, estimate the duration, and write nothing",
    )


def execute(arguments: argparse.Namespace) -> Result:
    """Tune."""
    if arguments.work_dir is None and not arguments.dry_run:
        raise InvalidArgumentError(
            "--work-dir is required",
            hint="Add --work-dir runs/t, or --dry-run to estimate the duration.",
        )
    from dcnv3_tvm import targets
    from dcnv3_tvm.compiler.compile import check_dtype
    from dcnv3_tvm.tuning.context import check_work_directory
    from dcnv3_tvm.tuning.device_pool import check_measurable
    from dcnv3_tvm.tuning.display import Display
    from dcnv3_tvm.tuning.tune import estimate, tune

    config = _config(arguments)
    # Before models are imported, which takes a while.
    target = targets.resolve_target(config.target)
    check_dtype(config.dtype, target)
    if config.rpc is None:
        check_measurable(target)
    if not arguments.dry_run:
        check_work_directory(arguments.work_dir)
    models = _models(arguments)
    if arguments.dry_run:
        with Progress("time the default schedules", quiet=arguments.quiet):
            plan = estimate(models, config)
        return Result(plan, _plan_text(plan))
    show = (lambda _: None) if arguments.quiet else Display().show
    summary = tune(models, arguments.work_dir, config, on_update=show)
    return Result(summary, _summary_text(summary, arguments))


def parse_address(text: str, option: str) -> tuple[str, int]:
    """Parse ``HOST:PORT``."""
    host, _, port = text.rpartition(":")
    if not host or not re.fullmatch(r"[0-9]{1,5}", port) or not 1 <= int(port) < 2**16:
        raise InvalidArgumentError(
            f"{option} is not an address",
            got=repr(text),
            allowed="HOST:PORT, such as 10.0.0.1:9190",
        )
    return host, int(port)


def _config(arguments: argparse.Namespace) -> TuneConfig:
    from dcnv3_tvm.tuning.tune import TuneConfig

    return TuneConfig(
        target=arguments.target,
        dtype=arguments.dtype,
        trials=arguments.trials,
        minutes=arguments.minutes,
        timeout=arguments.timeout,
        threads=arguments.threads,
        device=arguments.device,
        rpc=_rpc(arguments),
        backward=arguments.backward,
    )


def _rpc(arguments: argparse.Namespace) -> RpcConfig | None:
    from dcnv3_tvm.tuning.rpc import RpcConfig

    if arguments.rpc is None:
        return None
    if arguments.rpc_key is None:
        raise InvalidArgumentError(
            "--rpc needs --rpc-key", hint="Pass the key of `dcnv3-tvm worker --key KEY`."
        )
    host, port = parse_address(arguments.rpc, "--rpc")
    return RpcConfig(host, port, arguments.rpc_key, arguments.rpc_workers)


def _models(arguments: argparse.Namespace) -> list[ImportedModel | DCNv3Spec]:
    """Import the models and parse the slugs of operators."""
    from dcnv3_tvm.frontend.models.variants import model_config
    from dcnv3_tvm.spec import DCNv3Spec

    operators = [name for name in arguments.models if name.startswith(_OPERATOR_PREFIX)]
    models = [name for name in arguments.models if not name.startswith(_OPERATOR_PREFIX)]
    result: list[ImportedModel | DCNv3Spec] = [DCNv3Spec.from_slug(name) for name in operators]
    for name in models:
        # Raises before any model is imported.
        image_shape(arguments, model_config(name).resolution)
    for name in models:
        with Progress(f"import {name}", quiet=arguments.quiet):
            result.append(import_model(name, arguments))
    return result


def import_model(name: str, arguments: argparse.Namespace) -> ImportedModel:
    """Import a model with random weights, which do not affect its kernels."""
    from dcnv3_tvm import frontend
    from dcnv3_tvm.frontend.models.variants import model_config

    example = image_shape(arguments, model_config(name).resolution)
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
            table(["share", "calls", "us/call", "schedules", "kernel"], rows),
            "",
            f"{len(rows)} kernels for {plan['target']}: {plan['trials']} trials would take about "
            f"{plan['minutes']:.1f} minutes",
        ]
    )


def _summary_text(summary: dict[str, Any], arguments: argparse.Namespace) -> str:
    from dcnv3_tvm.tuning.summary import totals_text

    rows = [
        (
            f"{100 * kernel['share_before']:5.1f}%",
            f"{1e6 * kernel['default_seconds']:9.1f}",
            f"{1e6 * kernel['seconds']:9.1f}",
            f"{kernel['default_seconds'] / kernel['seconds']:6.2f}x",
            ", ".join(f"{name}={value}" for name, value in kernel["decisions"].items()),
            f"{kernel['calls']} x {kernel['kernel']}",
        )
        for kernel in summary["kernels"][:_MAX_ROWS]
    ]
    hidden = len(summary["kernels"]) - len(rows)
    totals = ("trials", "max_trials", "trials_per_minute", "before", "after")
    lines = [
        table(["share", "default us", "tuned us", "speedup", "decisions", "kernel"], rows),
        *([f"... and {hidden} more in {arguments.work_dir / 'summary.json'}"] if hidden else []),
        "",
        f"{'interrupted' if summary['interrupted'] else 'done'}: "
        + totals_text(**{name: summary[name] for name in totals}),
    ]
    if summary["without_schedule"]:
        lines.append(f"every schedule failed: {', '.join(summary['without_schedule'])}")
    lines += [
        f"next: {_next_command(name, summary['target'], arguments)}"
        for name in arguments.models
        if not name.startswith(_OPERATOR_PREFIX)
    ]
    return "\n".join(lines)


def _next_command(name: str, target: str, arguments: argparse.Namespace) -> str:
    """Return the command that compiles a model with the kernels that were tuned."""
    words = ["dcnv3-tvm", "compile", name, "--checkpoint", "FILE", "--target", target]
    words += ["--dtype", arguments.dtype, "--batch", str(arguments.batch)]
    if arguments.size is not None:
        words += ["--size", size_name(arguments.size)]
    return shlex.join([*words, "--database", str(arguments.work_dir), "-o", name])
