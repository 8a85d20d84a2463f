import os
import tempfile
from pathlib import Path

import numpy as np
import pytest

from dcnv3_tvm import machine
from dcnv3_tvm.environment import DCNV3_TVM_CACHE
from emulated_gpu import EmulatedGpu


def pytest_configure(config):
    """Keep the user's cache of compiled operators apart; the workers of a run share one."""
    if not hasattr(config, "workerinput"):
        folder = tempfile.TemporaryDirectory(prefix="dcnv3-tvm-tests-")
        os.environ[DCNV3_TVM_CACHE.name] = folder.name
        config.add_cleanup(folder.cleanup)


def pytest_collection_modifyitems(items):
    """Mark the tests that ``make test`` leaves out; fail if a line names none."""
    folder = Path(__file__).parent
    lines = (folder / "exhaustive.txt").read_text().splitlines()
    named = {line: 0 for line in lines if not line.startswith("#")}
    for item in items:
        test = item.nodeid.partition("tests/")[2]
        for line in filter(test.startswith, named):
            named[line] += 1
            item.add_marker("exhaustive")
    files = {item.path.relative_to(folder).as_posix() for item in items}
    unknown = [line for line in named if line.partition("::")[0] in files and not named[line]]
    whole = all(line.partition("::")[0] in files for line in named)
    if unknown and whole:
        raise pytest.UsageError(f"exhaustive.txt names tests that do not exist: {unknown}")


@pytest.fixture
def rng():
    return np.random.default_rng(20260801)


@pytest.fixture
def report_features(monkeypatch):
    """Make this machine report that its processor has the given features, and no others."""

    def report(features):
        reported = {name: name in features for name in machine._KERNEL_FLAGS}
        monkeypatch.setattr(machine, "reported_features", lambda: reported)

    return report


@pytest.fixture(scope="session")
def gpu():
    """A GPU that is emulated by the processor."""
    with EmulatedGpu() as emulated:
        yield emulated


@pytest.fixture(scope="module")
def unoptimized():
    """Build models for CPUs without LLVM's optimisations, for tests that do not check CPU code."""
    from tvm.target import Target

    from dcnv3_tvm.compiler import compile as compiler
    from dcnv3_tvm.targets import is_gpu

    build = compiler.build_library

    def build_unoptimized(module, target, library, **options):
        if not is_gpu(target):
            target = Target(dict(target.export()) | {"opt-level": 0})
        build(module, target, library, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiler, "build_library", build_unoptimized)
        yield
