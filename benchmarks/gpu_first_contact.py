"""Check a GPU that this library has not run on before, where no compiler is installed.

Where TVM and nvcc are, for example on a machine without a GPU:

    python benchmarks/gpu_first_contact.py prepare FOLDER [--variant internimage_t]

Where the GPU is, with this repository, NumPy, ml_dtypes and FOLDER/requirements.txt, but without
TVM (PyTorch for CUDA is used if it is there):

    python benchmarks/gpu_first_contact.py run FOLDER [--only 'dcnv3*']

Each check is a process of its own with a time limit. It prints a line and appends a JSON record to
FOLDER/records.jsonl. The exit code is 1 if a check failed. A check that cannot run is reported as
not run, with the reason.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import fnmatch
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Final

from first_contact.contents import ENCODERS, Contents

RECORDS: Final = "records.jsonl"
_RESULT: Final = "first-contact: "
"""Start of the line that a check's process prints last."""

_SANITIZER: Final = "compute-sanitizer"
_SANITIZER_TOOLS: Final = ("memcheck", "racecheck", "synccheck")
_UNSUPPORTED: Final = "Device not supported"
"""The sanitizer's message on virtual machines without debugging of the GPU."""

_SANITIZER_LINE: Final = "========="
_LINES: Final = 6
"""Lines of the output of a failed process in its record."""

_BENCH: Final = "dcnv3-n64-h56-*"
"""The operators of the first stage, which take the most time."""

_SECONDS: Final = 60.0
_SANITIZER_SECONDS: Final = 150.0
_LONG_SECONDS: Final = 180.0


@dataclasses.dataclass(frozen=True)
class Record:
    """Result of a check.

    Parameters
    ----------
    name : str
        The check.
    ok : bool or None
        Whether it passed; None if it was not run.
    seconds : float
        Duration of its process.
    error : str
        Why it failed or was not run.
    details : dict
        What it measured.
    """

    name: str
    ok: bool | None
    seconds: float = 0.0
    error: str = ""
    details: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def line(self) -> str:
        """The result in a line."""
        state = {True: "ok", False: "FAILED", None: "not run"}[self.ok]
        said = self.error or ", ".join(f"{key}: {_text(self.details[key])}" for key in self.details)
        return f"{state:8}{self.seconds:6.1f} s  {self.name}{': ' if said else ''}{said}"


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return " ".join(_text(each) for each in value.values())
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def run(contents: Contents, only: str, seconds: float) -> int:
    """Run the checks whose names match a pattern; return the exit code."""
    from first_contact.checks import BENCH, TESTS, checks

    contents.unpack()
    names = [*checks(contents), *(f"{_SANITIZER} {tool}" for tool in _SANITIZER_TOOLS)]
    failed = 0
    for name in fnmatch.filter(names, only):
        tool = name.removeprefix(f"{_SANITIZER} ")
        if tool != name:
            record = _sanitize(contents, tool)
        else:
            limit = max(seconds, _LONG_SECONDS) if name in (TESTS, BENCH) else seconds
            record = _run_process(contents, name, limit)
        print(record.line, flush=True)
        with (contents.root / RECORDS).open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(dataclasses.asdict(record)) + "\n")
        failed += record.ok is False
    return int(failed > 0)


def _sanitize(contents: Contents, tool: str) -> Record:
    """Run the small encoder under a tool of the compute sanitizer."""
    name = f"{_SANITIZER} {tool}"
    command = shutil.which(_SANITIZER) or shutil.which(f"/usr/local/cuda/bin/{_SANITIZER}")
    if command is None:
        return Record(name, None, error=f"{_SANITIZER} is not installed")
    prefix = [command, "--tool", tool, "--error-exitcode", "99"]
    record = _run_process(contents, ENCODERS[0], _SANITIZER_SECONDS, prefix)
    unsupported = _UNSUPPORTED in record.error
    return dataclasses.replace(record, name=name, ok=None if unsupported else record.ok)


def _run_process(
    contents: Contents, name: str, seconds: float, prefix: list[str] | None = None
) -> Record:
    command = [*(prefix or []), sys.executable, __file__, "check", str(contents.root), name]
    start = time.perf_counter()
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    ) as process:
        try:
            output, _ = process.communicate(timeout=seconds)
            ended = ""
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # the sanitizer has child processes
            output, _ = process.communicate()
            ended = f"stopped after {seconds:g} s"
    spent = time.perf_counter() - start
    if not ended and process.returncode < 0:
        ended = f"ended by {signal.Signals(-process.returncode).name}"
    said = [line for line in output.splitlines() if line.startswith(_RESULT)]
    record = Record(name, False, spent)
    if said:
        record = dataclasses.replace(record, **json.loads(said[-1].removeprefix(_RESULT)))
    # A process may fail after it printed its result: when it frees memory.
    if not ended and process.returncode == 0 and said:
        return record
    reason = record.error or ended or f"exit code {process.returncode}"
    lines = output.strip().splitlines()
    shown = [line for line in lines if line.startswith(_SANITIZER_LINE)][:_LINES]
    if not record.error:
        shown = shown or lines[-_LINES:]
    return dataclasses.replace(record, ok=False, error=" | ".join([reason, *shown]))


def check(contents: Contents, name: str) -> int:
    """Run a check in this process, print its result and return the exit code."""
    from first_contact.checks import NotRunError, checks

    ok: bool | None = True
    error, details = "", {}
    try:
        details = checks(contents)[name](contents)
    except NotRunError as reason:
        ok, error = None, str(reason)
    except Exception as problem:  # any failure is a result
        ok, error = False, f"{type(problem).__name__}: {problem}"
    print(_RESULT + json.dumps({"ok": ok, "error": error, "details": details}), flush=True)
    return int(ok is False)


def main() -> int:
    """Run a command and return the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    parsers = {name: commands.add_parser(name) for name in ("prepare", "run", "check")}
    for each in parsers.values():
        each.add_argument("folder", type=Path)
    preparing = parsers["prepare"]
    preparing.add_argument("--target", default="cuda-sm90")
    preparing.add_argument("--variant", action="append", default=[], help="a large encoder")
    preparing.add_argument("--batch", type=int, nargs="+", default=[1, 64])
    preparing.add_argument("--size", type=int, default=224)
    preparing.add_argument("--bench", default=_BENCH, help="operators of `bench gpu`: a pattern")
    parsers["run"].add_argument("--only", default="*", help="checks whose name matches")
    parsers["run"].add_argument("--seconds", type=float, default=_SECONDS, help="limit of a check")
    parsers["check"].add_argument("name")
    arguments = parser.parse_args()
    contents = Contents(arguments.folder)
    if arguments.command != "prepare" and not contents.manifest_path.is_file():
        parser.error(f"{arguments.folder} is not a folder that `prepare` completed")
    if arguments.command == "run":
        return run(contents, arguments.only, arguments.seconds)
    if arguments.command == "check":
        return check(contents, arguments.name)
    if arguments.folder.exists() and any(arguments.folder.iterdir()):
        parser.error(f"{arguments.folder} is not empty; choose a new folder")
    from first_contact.prepare import LIMIT, prepare

    size = prepare(
        arguments.folder,
        arguments.target,
        arguments.variant,
        arguments.batch,
        arguments.size,
        arguments.bench,
    )
    print(f"{arguments.folder}: {size / 2**20:.1f} MiB")
    if size > LIMIT:
        print(f"This is more than {LIMIT >> 20} MiB, which some machines cannot be sent.")
    return int(size > LIMIT)


if __name__ == "__main__":
    sys.exit(main())
