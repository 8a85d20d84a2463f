"""Tuning records: the fastest decisions measured for each kernel, in one folder a target."""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

import tvm_ffi
from tvm import tirx
from tvm.target import Target, codegen

from dcnv3_tvm import checks, files
from dcnv3_tvm.errors import InvalidArgumentError
from dcnv3_tvm.json_values import decode
from dcnv3_tvm.op.expr import static
from dcnv3_tvm.schedules.rule import kernel_name
from dcnv3_tvm.schedules.space import Decision
from dcnv3_tvm.targets import is_gpu, target_slug, vector_bits

SCHEMA: Final = 1
"""Version of the file format."""

SHIPPED: Final = Path(__file__).with_name("records")
"""Records that this package ships, one folder a target."""

SESSION_SUBFOLDER: Final = "records"
"""Subfolder of a tuning session's work directory that holds its records."""

_RECORDS: Final = "records.jsonl"
_ABOUT: Final = "about.json"

_GENERIC: Final = {512: "cpu-x86-64-v4", 256: "cpu-x86-64-v3"}
"""Shipped records for other x86-64 CPUs, by vector width in bits."""


class RecordsError(InvalidArgumentError):
    """Tuning records cannot be read, or are for another target or TVM version."""


@dataclasses.dataclass(frozen=True)
class Record:
    """The fastest schedule found for a kernel.

    Parameters
    ----------
    workload : str
        `workload_key` of the kernel.
    kernel : str
        `describe_kernel` of the kernel.
    rule : str
        Name of the schedule rule.
    decisions : dict of str to Decision
        The rule's decisions; its defaults if tuning found nothing faster.
    seconds, default_seconds : float
        Median time of a call with these decisions and with the defaults, measured in one session.
    trials : int
        Schedules measured.
    """

    workload: str
    kernel: str
    rule: str
    decisions: Mapping[str, Decision]
    seconds: float
    default_seconds: float
    trials: int

    @property
    def speedup(self) -> float:
        """Time with the default decisions divided by the time with these."""
        return self.default_seconds / self.seconds


@dataclasses.dataclass(frozen=True)
class About:
    """Where records come from; the content of ``about.json``.

    Parameters
    ----------
    target : str
        Slug of the target.
    tvm : str
        Version of apache-tvm. Other versions hash kernels differently, and may compile the same
        schedule to faster or slower code.
    hardware : str
        CPU or GPU that the records were measured on.
    cores : int
        CPU cores used.
    commit : str or None
        Git commit of this library; None for an installed package.
    trials : int
        Schedules measured, for all kernels.
    date : str
        UTC, ISO 8601.
    """

    target: str
    tvm: str
    hardware: str
    cores: int
    commit: str | None
    trials: int
    date: str


@dataclasses.dataclass(frozen=True)
class Records:
    """Records for one target.

    Parameters
    ----------
    about : About
        Where the records come from.
    by_workload : dict of str to Record
        Records by their `workload`.
    """

    about: About
    by_workload: Mapping[str, Record]

    @classmethod
    def of(cls, about: About, records: Iterable[Record]) -> Records:
        """Collect records, keeping the fastest of each kernel."""
        chosen: dict[str, Record] = {}
        for record in records:
            known = chosen.get(record.workload)
            if known is None or record.seconds < known.seconds:
                chosen[record.workload] = record
        return cls(about, chosen)

    @classmethod
    def read(cls, folder: Path) -> Records:
        """Read records from a folder.

        Raises
        ------
        RecordsError
            If it holds no records, damaged ones, or ones of another format or TVM version.
        """
        about = _read_about(folder)
        try:
            lines = (folder / _RECORDS).read_text(encoding="utf-8").splitlines()
        except (OSError, ValueError) as error:
            raise _unreadable(folder, error) from error
        return cls.of(about, map(_record, lines))

    def find(self, func: tirx.PrimFunc) -> Record | None:
        """Return the record of an unscheduled kernel, or None."""
        return self.by_workload.get(workload_key(func))

    def write(self, folder: Path) -> None:
        """Write records to a folder atomically, the slowest kernels first.

        Raises
        ------
        RecordsError
            If the folder holds other files, which would be lost.
        OSError
            If it cannot be written.
        """
        empty = not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))
        if not empty and not holds_records(folder):
            raise RecordsError(
                "the destination exists and does not hold tuning records",
                got=folder,
                hint="Choose another folder, or remove this one first.",
            )
        ordered = sorted(self.by_workload.values(), key=lambda record: -record.default_seconds)
        lines = [json.dumps(dataclasses.asdict(record)) + "\n" for record in ordered]
        about = {"schema": SCHEMA, **dataclasses.asdict(self.about)}
        with files.atomic_folder(folder) as temporary:
            (temporary / _RECORDS).write_text("".join(lines), encoding="utf-8")
            (temporary / _ABOUT).write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")


def _record(line: str) -> Record:
    try:
        record: Record = decode(Record, json.loads(line), "record")
        if not (0 < record.seconds < math.inf and 0 < record.default_seconds < math.inf):
            raise ValueError("a time is not a positive number")
        return record
    except (ValueError, RecursionError) as error:
        raise RecordsError(
            "a tuning record is damaged",
            got=f"{line[:100]!r} ({error})",
            hint="Delete this line, or tune again.",
        ) from error


def _read_about(folder: Path) -> About:
    try:
        text = (folder / _ABOUT).read_text(encoding="utf-8")
        data: dict[str, Any] = decode(dict[str, Any], json.loads(text), "about")
    except (OSError, ValueError, RecursionError) as error:
        raise _unreadable(folder, error) from error
    schema = data.get("schema")
    if schema != SCHEMA:
        raise RecordsError(
            "tuning records have another format",
            got=f"schema {schema} in {folder}",
            allowed=f"schema {SCHEMA}",
            hint="Tune again with the installed dcnv3_tvm.",
        )
    try:
        about: About = decode(About, data, "about")
    except (ValueError, RecursionError) as error:
        raise _unreadable(folder, error) from error
    installed = tvm_version()
    if about.tvm != installed:
        raise RecordsError(
            "tuning records were made with another version of TVM",
            got=f"apache-tvm {about.tvm} in {folder}",
            allowed=f"apache-tvm {installed} (installed)",
            hint="Tune again, or compile without records (--database none).",
        )
    return about


def _unreadable(folder: Path, error: Exception) -> RecordsError:
    return RecordsError(
        "no tuning records can be read",
        got=f"{folder} ({getattr(error, 'strerror', None) or error})",
        allowed=f"a folder with {_RECORDS} and {_ABOUT}, as `dcnv3-tvm tune` writes it",
    )


def holds_records(folder: Path) -> bool:
    """Whether a folder was written by `Records.write`."""
    return (folder / _ABOUT).is_file()


def records_folder(folder: Path) -> Path:
    """Return the records subfolder of a tuning session's work directory, or the folder itself."""
    subfolder = folder / SESSION_SUBFOLDER
    return subfolder if holds_records(subfolder) else folder


def find_records(target: Target, database: str | os.PathLike[str]) -> Records | None:
    """Find tuning records for a target.

    Parameters
    ----------
    target : tvm.target.Target
        Target to schedule for.
    database : str or path
        ``"default"`` for the shipped records, ``"none"``, or a folder of records or the work
        directory of a tuning session.

    Returns
    -------
    Records or None
        None for ``"none"``, or if no records are shipped for the target.

    Raises
    ------
    RecordsError
        If the folder holds no records, or records for another target or TVM version.
    """
    if database == "none":
        return None
    if database == "default":
        return shipped_records(target)
    records = Records.read(records_folder(checks.path("database", database)))
    slug = target_slug(target)
    if records.about.target != slug:
        raise RecordsError(
            "the tuning records are for another target",
            got=f"{records.about.target} in {database}",
            allowed=slug,
            hint=f"Compile with --target {records.about.target}, or tune for {slug}.",
        )
    return records


def shipped_records(target: Target) -> Records | None:
    """Return the shipped records for a target, or None.

    An x86-64 CPU without records of its own gets those of the x86-64 level of its vector width.
    """
    slugs = [target_slug(target)]
    if not is_gpu(target) and "x86_64" in _triple(target):
        slugs.append(_GENERIC.get(vector_bits(target), ""))
    for slug in filter(None, slugs):
        if holds_records(SHIPPED / slug):
            return _shipped(slug)
    return None


def _triple(target: Target) -> str:
    return str(target.attrs.get("mtriple") or codegen.llvm_get_system_triple())


@functools.cache
def _shipped(slug: str) -> Records:
    return Records.read(SHIPPED / slug)


def workload_key(func: tirx.PrimFunc) -> str:
    """Hash an unscheduled kernel: its computation and shapes, but not its name."""
    plain = func.without_attr("global_symbol").without_attr("op_pattern")
    return f"{tvm_ffi.structural_hash(plain) & (2**64 - 1):016x}"


def describe_kernel(func: tirx.PrimFunc) -> str:
    """Describe a kernel: its kind and the shapes of its arguments."""
    shapes = []
    # Other parameters are dynamic sizes.
    for buffer in (parameter for parameter in func.params if isinstance(parameter, tirx.Buffer)):
        sizes = "x".join(str(static(size) or size) for size in buffer.shape)
        shapes.append(sizes if str(buffer.dtype) == "float32" else f"{sizes} {buffer.dtype}")
    return f"{kernel_name(func) or 'stock'}({', '.join(shapes[:-1])}) -> {shapes[-1]}"


def tvm_version() -> str:
    """Return the installed version of apache-tvm."""
    return importlib.metadata.version("apache-tvm")
