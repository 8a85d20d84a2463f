"""Link object files to a shared library with the system's linker; no C++ compiler is needed."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from typing import Any, Final

_LINKERS: Final = ("ld", "ld.lld")


def find_linker() -> str | None:
    """Return the path of the system's linker; None without one."""
    return next(filter(None, map(shutil.which, _LINKERS)), None)


def link(output: str, objects: Sequence[str], **_options: Any) -> None:
    """Link object files; an ``fcompile`` of TVM's ``export_library``.

    Raises
    ------
    RuntimeError
        If there is no linker, or it reports an error, as for code of another architecture.
    """
    linker = find_linker()
    if linker is None:
        raise RuntimeError("there is no linker (ld)")
    command = [linker, "-shared", "-z", "noexecstack", "-o", output, *objects]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{linker} fails: {done.stderr.strip()}")
