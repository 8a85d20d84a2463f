"""Matmuls and convolutions that got no schedule of their own."""

import dataclasses
from types import SimpleNamespace

import pytest
from tvm import tirx

from dcnv3_tvm import schedules
from dcnv3_tvm.compiler.schedule_checks import check_rules
from dcnv3_tvm.errors import CompileError, DCNv3Warning
from dcnv3_tvm.kernels.epilogue import Epilogue
from dcnv3_tvm.targets import resolve_target
from helpers.gpu_kernels import gemm, implicit_gemm, mlp

TARGET = resolve_target("cuda-sm90")
WINDOW = {"kernel_size": (3, 3), "stride": (2, 2), "pad": (1, 1)}


# Row counts n * h * w whose common divisor with the 128 rows of a tile is 1, 4, 16, 64 and 128.
@pytest.mark.parametrize("side", [7, 14, 28, 56, 16])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_dynamic_batches_keep_their_rule(side, dtype):
    n = tirx.Var("n", "int64")
    kernels = [
        gemm((n, side, side), 64, 48, epilogue=Epilogue(bias=True), dtype=dtype),
        implicit_gemm(n, side * 2, side * 2, 32, 64, dtype=dtype, **WINDOW),
    ]
    if dtype == "float16":
        options = {"activation": "gelu", "residual": True, "dtype": dtype}
        kernels.append(mlp((n, side, side), 64, 96, 64, **options))
    found = {str(index): schedules.apply_rules(k, TARGET) for index, k in enumerate(kernels)}
    assert [kernel.rule for kernel in found.values()] == ["gemm", "gemm", "mlp"][: len(found)]
    check_rules(found, on_gpu=True)


def test_fallback_of_a_matmul_is_an_error():
    kernel = gemm((8,), 32, 16, dtype="float16")
    slow = dataclasses.replace(
        schedules.apply_rules(kernel, TARGET), rule="fallback", refusals={"gemm": "too odd"}
    )
    with pytest.raises(CompileError, match="own; got dense: too odd"):
        check_rules({"dense": slow}, on_gpu=True)


def test_fallback_of_a_stock_matmul_is_a_warning(recwarn):

    def slow(*shape):
        result = tirx.decl_buffer(shape)
        return schedules.ScheduledKernel(
            SimpleNamespace(attrs=None, params=[result]), "fallback", {}
        )

    kernels = {"matmul": slow(2, 5, 7), "matmul1": slow(2, 1, 7), "softmax": slow(2, 5, 7)}
    check_rules(kernels, on_gpu=False)
    assert not recwarn
    with pytest.warns(DCNv3Warning, match="without tensor cores: matmul$"):
        check_rules(kernels, on_gpu=True)
