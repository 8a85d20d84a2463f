"""``dcnv3-tvm profile``: where an artifact spends its time."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from dcnv3_tvm import files
from dcnv3_tvm.cli.arguments import add_chosen_size, parse_count, parse_path
from dcnv3_tvm.cli.result import Result, table
from dcnv3_tvm.cli.run import add_value_range
from dcnv3_tvm.errors import INSTALL_TVM, InvalidArgumentError, MissingDependencyError
from dcnv3_tvm.progress import Progress
from dcnv3_tvm.signature import MAIN

if TYPE_CHECKING:
    import numpy as np

    from dcnv3_tvm.bench.roofline import Peaks
    from dcnv3_tvm.runtime import CompiledModel
    from dcnv3_tvm.runtime.profile import Profile, ProfiledKernel

HELP: Final = "time the kernels of an artifact within a call, next to their rooflines"
EXAMPLE: Final = "dcnv3-tvm profile artifact photo.jpg --plot profile.png --trace trace.json"

_HEADER: Final = (
    *("kernel", "rule", "calls", "MB", "GFLOP", "ms", "share"),
    *("roofline, ms", "time/roofline", "shapes"),
)
_ROOFLINE: Final = slice(7, 9)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("artifact", type=parse_path, help="artifact folder, compiled for a CPU")
    parser.add_argument(
        "image",
        type=parse_path,
        nargs="?",
        help="image file (default: random values, and zeros for integers, where shapes are fixed)",
    )
    parser.add_argument(
        "--calls", type=parse_count, default=10, metavar="N", help="calls to time (default: 10)"
    )
    add_chosen_size(parser)
    parser.add_argument("--threads", type=parse_count, metavar="N", help="CPU threads")
    parser.add_argument(
        "--plot", type=parse_path, metavar="FILE", help="save a bar chart (.png, .svg, .pdf)"
    )
    parser.add_argument(
        "--trace",
        type=parse_path,
        metavar="FILE",
        help="write the kernels of a call for chrome://tracing and ui.perfetto.dev (.json)",
    )
    add_value_range(parser)


def execute(arguments: argparse.Namespace) -> Result:
    """Time the kernels."""
    from dcnv3_tvm import runtime

    model = runtime.load(arguments.artifact, threads=arguments.threads)
    with Progress(f"profile {model.metadata.name}", quiet=arguments.quiet) as progress:
        inputs = _inputs(model, arguments)
        progress.step("measure the peak rates of the machine")
        peaks = _peaks(model.threads)
        if peaks is None:
            progress.note(f"without rooflines, which need TVM's compiler. {INSTALL_TVM}")
        if not model.metadata.work:
            peaks = None
            progress.note(
                "without GFLOP and rooflines: the artifact is of an earlier version, which left "
                "out the operations of kernels. Compile it again."
            )
        progress.step(f"time {arguments.calls} calls")
        found = model.profile(*inputs, calls=arguments.calls)
    rooflines = {kernel: _roofline(kernel, peaks) for kernel in found.kernels}

    def save() -> None:
        if arguments.trace is not None:
            _write_trace(found, arguments.trace)
        if arguments.plot is not None:
            from dcnv3_tvm.bench.profile_plot import save_profile_plot

            save_profile_plot(found, list(rooflines.values()), model.metadata.name, arguments.plot)

    kernels = [
        dataclasses.asdict(kernel) | {"roofline_seconds": rooflines[kernel]}
        for kernel in found.kernels
    ]
    data = {
        "artifact": str(arguments.artifact),
        "seconds": found.seconds,
        "other_seconds": found.other_seconds,
        "calls": found.calls,
        "threads": found.threads,
        "kernels": kernels,
    }
    return Result(data, _text(found, rooflines), save=save)


def _inputs(model: CompiledModel, arguments: argparse.Namespace) -> list[np.ndarray]:
    import numpy as np

    from dcnv3_tvm.dtypes import numpy_dtype

    model.metadata.preprocessing_for(arguments.size)  # Raises if there is no such size.
    infos = model.metadata.entry_for(MAIN, arguments.size).inputs
    shapes = [[size for size in info.shape if isinstance(size, int)] for info in infos]
    if arguments.image is not None:
        batch = infos[0].shape[0]
        pixels = model.preprocess(
            arguments.image, size=arguments.size, value_range=arguments.value_range
        )
        return [pixels.repeat(batch, axis=0) if isinstance(batch, int) else pixels]
    dynamic = [
        info for info, shape in zip(infos, shapes, strict=True) if len(shape) < len(info.shape)
    ]
    if dynamic:
        raise InvalidArgumentError(
            "the shape of the input is dynamic, so an image has to be given",
            got=dynamic[0].describe(),
            hint=f"dcnv3-tvm profile {arguments.artifact} photo.jpg",
        )
    generator = np.random.default_rng(0)
    return [
        generator.standard_normal(shape, np.float32).astype(numpy_dtype(info.dtype))
        if "float" in info.dtype
        else np.zeros(shape, info.dtype)  # Integers may be indices, of which 0 exists.
        for info, shape in zip(infos, shapes, strict=True)
    ]


def _peaks(threads: int) -> Peaks | None:
    """Measure the peak rates of the machine; None without TVM's compiler."""
    try:
        from dcnv3_tvm.bench.cpu_peaks import measure_peaks
    except (ImportError, MissingDependencyError):
        return None
    return measure_peaks(threads)


def _roofline(kernel: ProfiledKernel, peaks: Peaks | None) -> float | None:
    """Return the lower bound of the time of all calls of a kernel."""
    if peaks is None:
        return None
    from dcnv3_tvm.bench.roofline import Roofline

    bound = Roofline.of(kernel.flops, kernel.bytes, peaks, kernel.matmul_dtype)
    return kernel.calls * bound.seconds


def _text(found: Profile, rooflines: dict[ProfiledKernel, float | None]) -> str:
    rows = [_row(kernel, found.seconds, rooflines[kernel]) for kernel in found.kernels]
    header, note = list(_HEADER), "ms, share and roofline"
    if not any(rooflines.values()):
        note = "ms and share"
        for row in (header, *rows):
            del row[_ROOFLINE]
    inside = sum(kernel.seconds for kernel in found.kernels)
    lines = [
        table(header, rows),
        "",
        f"A call takes {1e3 * found.seconds:.3f} ms (median of {found.calls}, {found.threads} "
        f"threads): {1e3 * inside:.3f} ms in {len(found.timeline)} calls of {len(found.kernels)} "
        f"kernels, {1e3 * found.other_seconds:.3f} ms outside.",
        f"MB and GFLOP are those of one call of a kernel; {note} of all its calls.",
    ]
    if any(kernel.record == "hit" for kernel in found.kernels):
        lines.append("* A tuning record determined the schedule.")
    return "\n".join(lines)


def _row(kernel: ProfiledKernel, whole: float, roofline: float | None) -> list[str]:
    return [
        kernel.name,
        kernel.rule + ("*" if kernel.record == "hit" else ""),
        f"{kernel.calls:5d}",
        f"{kernel.bytes / 1e6:.2f}",
        f"{kernel.flops / 1e9:.3f}",
        f"{1e3 * kernel.seconds:.3f}",
        f"{100 * kernel.seconds / whole:.1f}%",
        "" if roofline is None else f"{1e3 * roofline:.3f}",
        "" if roofline is None else f"{kernel.seconds / roofline:.1f}x",
        kernel.shapes,
    ]


def _write_trace(found: Profile, path: Path) -> None:
    """Write the kernels of a call in the Trace Event Format, times in microseconds."""
    rules: dict[str, str] = {kernel.name: kernel.rule for kernel in found.kernels}
    begin = found.timeline[0].start
    events: list[dict[str, Any]] = [
        {
            "name": event.name,
            "cat": rules[event.name],
            "ph": "X",
            "ts": 1e6 * (event.start - begin),
            "dur": 1e6 * event.seconds,
            "pid": 0,
            "tid": 0,
        }
        for event in found.timeline
    ]
    with files.output_file("the trace", path) as temporary:
        temporary.write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}))
