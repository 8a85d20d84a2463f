"""The second argument of ``__launch_bounds__``."""

import re

import pytest
import tvm

from dcnv3_tvm import schedules
from dcnv3_tvm.compiler import device_passes
from dcnv3_tvm.compiler.cuda import cuda_sources
from dcnv3_tvm.op import mlp, normalization
from dcnv3_tvm.schedules.gpu.tensorize import tensorize
from dcnv3_tvm.targets import resolve_target

TARGET = resolve_target("cuda-sm90")
LAYER_NORM = normalization.layer_norm((4096,), 256, eps=1e-6, dtype="float16")


def bounds(func, **decisions):
    """Return what the CUDA source of a kernel says of its threads and blocks."""
    scheduled = tensorize(schedules.schedule(func, TARGET, decisions).function)
    module = tvm.IRModule({"main": scheduled.with_attr("global_symbol", "main")})
    with device_passes.lowering():
        built = tvm.compile(module, target=TARGET, tir_pipeline=device_passes.PIPELINE)
    (source,) = cuda_sources(built.mod)
    (found,) = set(re.findall(r"__launch_bounds__\(([\d, ]+)\)", source))
    return found


def test_by_default_ptxas_decides():
    assert bounds(LAYER_NORM) == "128"


@pytest.mark.parametrize(("given", "found"), [(1, 1), (12, 12), (16, 16)])
def test_a_decision_reaches_the_compiler(given, found):
    assert bounds(LAYER_NORM, min_blocks=given) == f"128, {found}"


def test_no_more_blocks_than_there_can_be():
    assert bounds(LAYER_NORM, min_blocks=16, rows=32) == "1024, 2"


def test_in_kernels_with_intrinsics():
    func = mlp.mlp((256,), 64, 256, 64, activation="gelu", residual=True, dtype="float16")
    assert bounds(func) == "128, 2"
    assert bounds(func, min_blocks=3) == "128, 3"
