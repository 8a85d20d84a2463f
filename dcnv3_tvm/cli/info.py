"""``dcnv3-tvm info``: describe an artifact."""

from __future__ import annotations

import argparse
import collections
from typing import TYPE_CHECKING, Any, Final

from dcnv3_tvm.cli.arguments import parse_path
from dcnv3_tvm.cli.result import Result, table
from dcnv3_tvm.signature import size_name

if TYPE_CHECKING:
    from dcnv3_tvm.runtime.metadata import ArtifactMetadata

HELP: Final = "describe an artifact without running it"
EXAMPLE: Final = "dcnv3-tvm info artifact"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("artifact", type=parse_path, help="artifact folder")


def execute(arguments: argparse.Namespace) -> Result:
    """Describe the artifact."""
    from dcnv3_tvm.errors import TargetError
    from dcnv3_tvm.runtime.loading import check_runs_here, read_metadata
    from dcnv3_tvm.runtime.metadata import WEIGHTS

    metadata = read_metadata(arguments.artifact)
    try:
        check_runs_here(metadata)
        runs_here = "yes"
    except TargetError as error:
        runs_here = f"no: {error}"
    sizes = {
        path.name: path.stat().st_size
        for path in sorted(arguments.artifact.iterdir())
        if path.is_file()
    }
    facts = [
        ("name", metadata.name),
        ("target", f"{metadata.target.slug} ({metadata.target.text})"),
        ("system", _system(metadata)),
        ("runs here", runs_here),
        ("AMX", "used, and needed" if metadata.uses_amx else "not used"),
        ("dtype", metadata.dtype),
        ("versions", ", ".join(f"{name} {value}" for name, value in metadata.versions.items())),
        ("created", metadata.created),
        ("weights", metadata.config.get("weights", "those of the imported model")),
        ("size", f"{sum(sizes.values()) / 1e6:.1f} MB"),
        ("memory", _memory(sizes.get(WEIGHTS, 0), metadata)),
        ("kernels", _kernels(metadata.kernels)),
        ("tuning records", tuning_summary(metadata)),
        ("verified", _verification(metadata.verification)),
    ]
    if metadata.labels:
        facts.append(("labels", f"{len(metadata.labels)}: {', '.join(metadata.labels[:3])}, ..."))
    if metadata.sizes:
        facts.append(("image sizes", ", ".join(map(size_name, metadata.image_sizes))))
    for name, entry in metadata.entries.items():
        facts += [
            (f"{role} of {name}", f"{tensor.name}: {tensor.describe()} {tensor.dtype}")
            for role, tensors in (("input", entry.inputs), ("output", entry.outputs))
            for tensor in tensors
        ]
    data = metadata.to_json() | {
        "files": sizes,
        "runs_here": runs_here,
        "uses_amx": metadata.uses_amx,
        "system": None if metadata.target.system is None else metadata.target.system.name,
    }
    return Result(data, table(["", ""], facts).strip("\n"))


def _system(metadata: ArtifactMetadata) -> str:
    target = metadata.target
    parts = [target.triple or "unknown" if target.system is None else target.system.name]
    if target.arch:
        parts.append(f"GPU {target.arch}")
    if not metadata.libraries:
        parts.append("without TVM's runtime library, which apache-tvm has")
    return ", ".join(parts)


def _memory(weights: int, metadata: ArtifactMetadata) -> str:
    parts = [f"weights {weights / 1e6:.1f} MB"]
    activations = metadata.activation_bytes
    parts += [f"activations of {name} {size / 1e6:.1f} MB" for name, size in activations.items()]
    shared = " (the largest, shared by the entries)" if metadata.sizes and activations else ""
    return ", ".join(parts) + shared


def _kernels(kernels: dict[str, str]) -> str:
    counts: dict[str, int] = {}
    for rule in kernels.values():
        counts[rule] = counts.get(rule, 0) + 1
    rules = ", ".join(f"{count} {rule}" for rule, count in sorted(counts.items()))
    return f"{len(kernels)} ({rules})" if rules else "0"


def tuning_summary(metadata: ArtifactMetadata) -> str:
    """Summarize how many kernels were scheduled by tuning records, and why others were not."""
    outcomes = collections.Counter(metadata.records.values())
    if not outcomes:
        return "not used"
    if outcomes.keys() == {"miss"}:
        return "none for these kernels"
    origin = metadata.records_from
    text = (
        f"hit for {outcomes.pop('hit', 0)} of {len(metadata.records)} kernels (recorded for "
        f"{origin['target']} on {origin['date'][:10]}, {origin['hardware']})"
    )
    missed = outcomes.pop("miss", 0)
    parts = [text, *([f"{missed} without a record"] if missed else [])]
    parts += [f"{count} rejected: {reason}" for reason, count in outcomes.items()]
    return "; ".join(parts)


def _verification(verification: dict[str, Any] | None) -> str:
    if verification is None:
        return "no (run `dcnv3-tvm verify --record`)"
    worst = max(row["max_error"] for row in verification["outputs"])
    verdict = "agrees with" if verification["ok"] else "DIFFERS from"
    return f"{verdict} {verification['reference']} (max error {worst:.1e} of max |reference|)"
