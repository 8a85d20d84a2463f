"""Tuning records: decisions that were measured to be the best for a kernel, by target."""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

import tvm_ffi
from tvm import tirx
from tvm.target import Target, codegen

from dcnv3_tvm import files
from dcnv3_tvm.errors import InvalidArgumentError
from dcnv3_tvm.op.expr import KERNEL_ATTR, static
from dcnv3_tvm.schedules.space import Decision
from dcnv3_tvm.targets import is_gpu, target_slug, vector_bits

SCHEMA: Final = 1
"""Version of the files' form."""

SHIPPED: Final = Path(__file__).with_name("records")
"""Records of this package, one folder a target."""

INSIDE: Final = "records"
"""Name of the folder with the records of a session, in its work directory."""

_RECORDS: Final = "records.jsonl"
_ABOUT: Final = "about.json"

_GENERIC: Final = {512: "cpu-x86-64-v4", 256: "cpu-x86-64-v3"}
"""Records for x86-64 processors that have none of their own, by the width of a vector."""


class RecordsError(InvalidArgumentError):
    """Tuning records cannot be read, or are not for what they are asked for."""


@dataclasses.dataclass(frozen=True)
class Record:
    """The best schedule found for a kernel.

    Parameters
    ----------
    workload : str
        What `workload_key` makes of the kernel.
    kernel : str
        The kernel for people.
    rule : str
        Name of the schedule rule.
    decisions : dict of str to Decision
        What the rule decides; the default's where tuning found nothing better.
    seconds, default_seconds : float
        Median time of a call, so and with the rule's own decisions, measured in one session.
    trials : int
        Schedules that were measured.
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
        """How many times faster than by default."""
        return self.default_seconds / self.seconds


@dataclasses.dataclass(frozen=True)
class About:
    """Where records come from.

    Parameters
    ----------
    target : str
        Slug of the target they are for.
    tvm : str
        Version of apache-tvm that made them. Another one may compile the same schedule to code of
        another speed, and identifies kernels differently.
    hardware : str
        What they were measured on.
    cores : int
        Cores that computed.
    commit : str or None
        Of this library, where it was a checkout.
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
        Where they come from.
    by_workload : dict of str to Record
        The records.
    """

    about: About
    by_workload: Mapping[str, Record]

    @classmethod
    def of(cls, about: About, records: Iterable[Record]) -> Records:
        """Collect records; of two for a kernel, the faster one."""
        chosen: dict[str, Record] = {}
        for record in records:
            known = chosen.get(record.workload)
            if known is None or record.seconds < known.seconds:
                chosen[record.workload] = record
        return cls(about, chosen)

    @classmethod
    def read(cls, folder: Path) -> Records:
        """Read a folder.

        Raises
        ------
        RecordsError
            If it holds no records, damaged ones, or records of another form or version of TVM.
        """
        about = _read_about(folder)
        try:
            lines = (folder / _RECORDS).read_text(encoding="utf-8").splitlines()
        except OSError as error:
            raise _unreadable(folder, error) from error
        return cls.of(about, map(_record, lines))

    def find(self, func: tirx.PrimFunc) -> Record | None:
        """Return the record of an unscheduled kernel; None where there is none."""
        return self.by_workload.get(workload_key(func))

    def write(self, folder: Path) -> None:
        """Write a folder, whole or not at all; the slowest kernels come first.

        Raises
        ------
        RecordsError
            If something else is there, which would be lost.
        OSError
            If it cannot be written.
        """
        empty = not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))
        if not empty and not holds_records(folder):
            raise RecordsError(
                "the destination exists and holds no records, so it is not replaced",
                got=folder,
                hint="Choose another folder, or remove it first.",
            )
        ordered = sorted(self.by_workload.values(), key=lambda record: -record.default_seconds)
        lines = [json.dumps(dataclasses.asdict(record)) + "\n" for record in ordered]
        about = {"schema": SCHEMA, **dataclasses.asdict(self.about)}
        with files.atomic_folder(folder) as temporary:
            (temporary / _RECORDS).write_text("".join(lines), encoding="utf-8")
            (temporary / _ABOUT).write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")


def _record(line: str) -> Record:
    try:
        return Record(**json.loads(line))
    except (ValueError, TypeError) as error:
        raise RecordsError(
            "a tuning record is damaged",
            got=f"{line[:100]!r} ({error})",
            hint="Remove its line, or tune again.",
        ) from error


def _read_about(folder: Path) -> About:
    try:
        data: dict[str, Any] = json.loads((folder / _ABOUT).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _unreadable(folder, error) from error
    schema = data.pop("schema", None)
    if schema != SCHEMA:
        raise RecordsError(
            "tuning records have another form",
            got=f"schema {schema} in {folder}",
            allowed=f"schema {SCHEMA}",
            hint="Tune again with the installed dcnv3_tvm.",
        )
    try:
        about = About(**data)
    except TypeError as error:
        raise _unreadable(folder, error) from error
    installed = tvm_version()
    if about.tvm != installed:
        raise RecordsError(
            "tuning records are of another version of TVM",
            got=f"apache-tvm {about.tvm} in {folder}",
            allowed=f"apache-tvm {installed}, which is installed",
            hint="Tune again, or compile without records (--database none).",
        )
    return about


def _unreadable(folder: Path, error: Exception) -> RecordsError:
    return RecordsError(
        "there are no tuning records to read",
        got=f"{folder} ({getattr(error, 'strerror', None) or error})",
        allowed=f"a folder with {_RECORDS} and {_ABOUT}, such as `dcnv3-tvm tune` writes",
    )


def holds_records(folder: Path) -> bool:
    """Whether a folder looks like one that `Records.write` wrote."""
    return (folder / _ABOUT).is_file()


def records_folder(folder: Path) -> Path:
    """Return the folder with the records of a session's work directory, or a folder as it is."""
    return folder / INSIDE if holds_records(folder / INSIDE) else folder


def find_records(target: Target, database: str | os.PathLike[str]) -> Records | None:
    """Find tuning records for a target.

    Parameters
    ----------
    target : tvm.target.Target
        What is compiled for.
    database : str or path
        ``"default"``: this package's own; ``"none"``; or a folder of records, or the work directory
        of a session.

    Returns
    -------
    Records or None
        None where the package has none for the target, or none are wanted.

    Raises
    ------
    RecordsError
        If the folder holds no records, or records for another target or version of TVM.
    """
    if database == "none":
        return None
    if database == "default":
        return shipped_records(target)
    records = Records.read(records_folder(Path(database)))
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
    """Return this package's records for a target; None where it has none.

    A processor without records of its own gets those for its width of vectors.
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
    """Identify an unscheduled kernel: its computation and its shapes, whatever it is called."""
    # Neither its name nor what fusion noted about it.
    plain = func.without_attr("global_symbol").without_attr("op_pattern")
    return f"{tvm_ffi.structural_hash(plain) & (2**64 - 1):016x}"


def describe(func: tirx.PrimFunc) -> str:
    """Name a kernel for people: what it computes, and the shapes of its arguments."""
    kind = str(func.attrs.get(KERNEL_ATTR, "stock")) if func.attrs else "stock"
    shapes = []
    # Parameters that are no buffers are sizes known only at run time.
    for buffer in (parameter for parameter in func.params if isinstance(parameter, tirx.Buffer)):
        sizes = "x".join(str(static(size) or size) for size in buffer.shape)
        shapes.append(sizes if str(buffer.dtype) == "float32" else f"{sizes} {buffer.dtype}")
    return f"{kind}({', '.join(shapes[:-1])}) -> {shapes[-1]}"


def tvm_version() -> str:
    """Return the version of apache-tvm that is installed."""
    return importlib.metadata.version("apache-tvm")
