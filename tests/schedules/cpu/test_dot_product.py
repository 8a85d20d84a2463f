"""Matmuls of bfloat16 pairs: the instruction is checked everywhere and run where supported."""

import ml_dtypes
import numpy as np
import pytest
import tvm
from tvm import tirx

from dcnv3_tvm import machine
from dcnv3_tvm.compiler import cpu_pipeline
from dcnv3_tvm.errors import InvalidArgumentError
from dcnv3_tvm.kernels.epilogue import Epilogue
from dcnv3_tvm.kernels.matmul import matmul
from dcnv3_tvm.kernels.packing import pack_matmul_weight
from dcnv3_tvm.op.expr import int64, product
from dcnv3_tvm.schedules import row_slack, schedule_module
from dcnv3_tvm.targets import resolve_target
from helpers import layers
from helpers.layers import run_kernel

FULL = Epilogue(bias=True, activation="gelu", residual=True)
TARGET = "cpu-znver4"

runs_here = pytest.mark.skipif(
    bool(machine.missing_features(["avx512bf16"])), reason="this CPU has no AVX512-BF16"
)


def narrow(rng, *shape):
    return rng.standard_normal(shape).astype(ml_dtypes.bfloat16)


def check(rng, assert_close, lead, sizes, inner, columns, *, epilogue=FULL, out_dtype=None):
    x, weight = narrow(rng, *sizes, inner), narrow(rng, columns, inner)
    bias = rng.standard_normal(columns).astype("float32")
    residual = rng.standard_normal((*sizes, columns)).astype("float32")
    func = matmul(
        lead,
        inner,
        columns,
        tile=32,
        row_slack=row_slack(product([int64(size) for size in lead])),
        epilogue=epilogue,
        dtype="bfloat16",
        out_dtype=out_dtype,
    )
    given = [x, pack_matmul_weight(weight, 32)]
    given += [bias] if epilogue.bias else []
    given += [residual] if epilogue.residual else []
    result = run_kernel(
        func,
        given,
        residual.shape,
        target=resolve_target(TARGET),
        dtype=ml_dtypes.bfloat16 if out_dtype else "float32",
    )
    exact = x.astype("float64") @ weight.T.astype("float64")
    reference = layers.finish(epilogue, exact, bias, residual)
    if out_dtype:
        # The store rounds a float32 value, which has rounding errors of its own.
        limit = 2.0**-8 * np.abs(reference) + 1e-5 * np.abs(reference).max()
        assert (np.abs(result.astype("float64") - reference) <= limit).all()
    else:
        assert_close(result, reference)


@runs_here
@pytest.mark.parametrize("sizes", [(1,), (3,), (13,), (2, 7, 7), (17, 19), (1, 14, 28)])
def test_any_number_of_rows(rng, assert_close, sizes):
    check(rng, assert_close, sizes, sizes, 24, 48)


@runs_here
@pytest.mark.parametrize("inner", [2, 6, 512, 1024])
@pytest.mark.parametrize("columns", [16, 32, 80, 112])
def test_any_number_of_pairs_and_column_vectors(rng, assert_close, inner, columns):
    check(rng, assert_close, (28,), (28,), inner, columns)


@runs_here
@pytest.mark.parametrize("sizes", [(1, 7, 7), (3, 7, 7), (2, 1, 1)])
def test_dynamic_batch_and_dynamic_shape(rng, assert_close, sizes):
    n, h, w = (tirx.Var(name, "int64") for name in "nhw")
    check(rng, assert_close, (n, *sizes[1:]), sizes, 16, 64)
    check(rng, assert_close, (n, h, w), sizes, 16, 64)


@runs_here
@pytest.mark.parametrize("epilogue", [Epilogue(), FULL])
def test_bfloat16_output(rng, assert_close, epilogue):
    check(rng, assert_close, (21,), (21,), 32, 48, epilogue=epilogue, out_dtype="bfloat16")


@runs_here
def test_weights_larger_than_the_cache(rng, assert_close):
    check(rng, assert_close, (49,), (49,), 2048, 256)


def compiled(rows, inner, columns):
    slack = row_slack(rows)
    func = matmul((rows,), inner, columns, tile=32, row_slack=slack, dtype="bfloat16")
    module = tvm.IRModule({"main": func.with_attr("global_symbol", "main")})
    target = resolve_target(TARGET)
    module, rules = schedule_module(module, target)
    assert rules["main"].rule == "matmul"
    built = tvm.compile(module, target=target, tir_pipeline=cpu_pipeline.PIPELINE)
    return built.mod.inspect_source("asm")


def test_inner_loop_has_only_dot_products():
    assembly = compiled(56, 64, 32)
    lines = assembly.splitlines()
    dots = [number for number, line in enumerate(lines) if "vdpbf16ps" in line]
    assert len(dots) == 2 * 14
    loop = lines[dots[0] : dots[-1] + 1]
    # The sums stay in registers: no store between the first dot product and the last.
    assert not [line for line in loop if line.split()[0].startswith("vmov") and "), %" not in line]


def test_rejects_odd_number_of_input_features():
    with pytest.raises(InvalidArgumentError, match="in pairs"):
        matmul((4,), 7, 16, tile=16, dtype="bfloat16")


def test_packing_interleaves_pairs(rng):
    weight = narrow(rng, 40, 6)
    packed = pack_matmul_weight(weight, 32)
    assert packed.shape == (2, 3, 32, 2)
    assert packed[1, 2, 7, 1] == weight[39, 5]
    assert (packed[1, :, 8:] == 0).all()
