"""Check import contracts and types on an unpacked copy of the package.

import-linter and mypy cannot see the folders schedules/ and frontend/ of an editable install, which
are mapped into the package. So setuptools copies the modules to build/typed in the layout of the
wheel, and both run there with the settings of pyproject.toml.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
COPY = ROOT / "build" / "typed"


def unpack() -> None:
    """Copy the package and its settings to build/typed, in the layout of the wheel."""
    shutil.rmtree(COPY, ignore_errors=True)
    command = [sys.executable, "-c", "import setuptools; setuptools.setup()", "--quiet"]
    subprocess.run([*command, "build_py", "--build-lib", str(COPY)], cwd=ROOT, check=True)
    shutil.copy(ROOT / "pyproject.toml", COPY)


def main() -> int:
    """Run both checkers; return the number of failures."""
    unpack()
    linter = [str(Path(sys.executable).with_name("lint-imports")), "--no-logo"]
    linter += ["--cache-dir", str(ROOT / ".import_linter_cache")]
    mypy = [sys.executable, "-m", "mypy", "--cache-dir", str(ROOT / ".mypy_cache")]
    environment = os.environ | {"PYTHONPATH": str(COPY)}
    return sum(
        subprocess.run(command, cwd=COPY, env=environment).returncode != 0
        for command in (linter, mypy)
    )


if __name__ == "__main__":
    sys.exit(main())
