import numpy as np
import pytest

from emulated_gpu import EmulatedGpu


@pytest.fixture
def rng():
    return np.random.default_rng(20260801)


@pytest.fixture(scope="session")
def gpu():
    """A GPU that is emulated by the processor."""
    with EmulatedGpu() as emulated:
        yield emulated
