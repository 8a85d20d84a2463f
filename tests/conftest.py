import os
import tempfile

import numpy as np
import pytest

from dcnv3_tvm.environment import DCNV3_TVM_CACHE
from emulated_gpu import EmulatedGpu


def pytest_configure(config):
    """Keep the user's cache of compiled operators apart; the workers of a run share one."""
    if not hasattr(config, "workerinput"):
        folder = tempfile.TemporaryDirectory(prefix="dcnv3-tvm-tests-")
        os.environ[DCNV3_TVM_CACHE.name] = folder.name
        config.add_cleanup(folder.cleanup)


@pytest.fixture
def rng():
    return np.random.default_rng(20260801)


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
