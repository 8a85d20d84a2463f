"""Min blocks of ``__launch_bounds__``."""

import re

import pytest

from dcnv3_tvm import schedules
from dcnv3_tvm.kernels.layer_norm import layer_norm as layer_norm_kernel
from dcnv3_tvm.targets import resolve_target
from helpers.gpu_kernels import mlp

TARGET = resolve_target("cuda-sm90")
LAYER_NORM = layer_norm_kernel((4096,), 256, eps=1e-6, dtype="float16")


@pytest.fixture
def bounds(cuda_code):
    """Return the arguments of ``__launch_bounds__`` in the CUDA code of a kernel."""

    def read(func, **decisions):
        code = cuda_code(schedules.schedule(func, TARGET, decisions).function, TARGET)
        (found,) = set(re.findall(r"__launch_bounds__\(([\d, ]+)\)", code))
        return found

    return read


def test_no_min_blocks_by_default(bounds):
    assert bounds(LAYER_NORM) == "128"


@pytest.mark.parametrize(("given", "found"), [(1, 1), (12, 12), (16, 16)])
def test_decided_min_blocks(bounds, given, found):
    assert bounds(LAYER_NORM, min_blocks=given) == f"128, {found}"


def test_min_blocks_fit_a_multiprocessor(bounds):
    assert bounds(LAYER_NORM, min_blocks=16, rows=32) == "1024, 2"


def test_kernels_with_intrinsics(bounds):
    func = mlp((256,), 64, 256, 64, activation="gelu", residual=True, dtype="float16")
    assert bounds(func) == "128, 2"
    assert bounds(func, min_blocks=3) == "128, 3"
