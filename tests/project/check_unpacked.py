"""Check import contracts and types on an unpacked copy of the package.

The folders schedules/ and frontend/ are mapped into the package, which import-linter and mypy do
not see where it is installed for editing. So setuptools lays the modules out in build/typed as a
wheel would, and both run there, with the settings of pyproject.toml.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
COPY = ROOT / "build" / "typed"
SETTINGS = ROOT / "pyproject.toml"


def unpack() -> None:
    """Lay the package out as a wheel would."""
    shutil.rmtree(COPY, ignore_errors=True)
    command = [sys.executable, "-c", "import setuptools; setuptools.setup()", "--quiet"]
    subprocess.run([*command, "build_py", "--build-lib", str(COPY)], cwd=ROOT, check=True)


def main() -> int:
    """Run both checkers; return the number of those that failed."""
    unpack()
    scripts = Path(sys.executable).parent
    linter = [str(scripts / "lint-imports"), "--no-logo", "--config", str(SETTINGS)]
    linter += ["--cache-dir", str(ROOT / ".import_linter_cache")]
    mypy = [sys.executable, "-m", "mypy", "--config-file", str(SETTINGS)]
    mypy += ["--cache-dir", str(ROOT / ".mypy_cache")]
    environment = os.environ | {"PYTHONPATH": str(COPY)}
    return sum(
        subprocess.run(command, cwd=COPY, env=environment).returncode != 0
        for command in (linter, mypy)
    )


if __name__ == "__main__":
    sys.exit(main())
